"""What all tests share: `support` beside this file is importable."""
