"""The signals' channels of messages between peers, and which messages are long.

q, k and v may travel in several messages, and so may a ring's block, each on a channel of its own: FIRST_SEND and
above; READY and up to three above.
"""

RETURN, RETURN_REST, RETURN_TEXT, DONE, READY, FIRST_SEND = 0, 1, 2, 3, 4, 8

PIECE = 1 << 20
"""Bytes to each peer from which on, where they take several hops, a part is on its second while the next is on its
first, of a ring the bytes of a block; and of two ranks own tokens come last."""
TURN = 1 << 19
"""The same for tensors that had better be projected one after the other. Measured from 0.9 MB on."""
