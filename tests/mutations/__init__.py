"""Small wrong changes to the code, one at a time: which of them do the tests notice?

Coverage says what runs; this says what is looked at. `changes` lists the changes, `__main__` makes them.
"""
