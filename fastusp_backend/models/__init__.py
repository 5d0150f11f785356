"""Model families as our own modules in the checkpoint's own key layout, and how a file is recognised and read."""
