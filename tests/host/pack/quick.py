"""What saves these hosts time in which nothing is tested."""

import gc
import sys

gc.freeze()  # ComfyUI collects garbage after prompts, and would look through all that it has imported each time


class QuickMeasuring:
    """From now on USP Measure compares what 8 bits change over few steps, with a prompt of few tokens."""

    INPUT_TYPES = classmethod(lambda cls: {})
    RETURN_TYPES = ()
    FUNCTION = "hurry"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def hurry(self):
        for name, module in list(sys.modules.items()):
            if name.endswith(".fastusp_backend.cli.verify"):
                module.STEPS = 3
            if name.endswith(".nodes.measuring"):
                module.TEXT = 32
        return ()


class StoppedSeconds:
    """From now on a rank that stands still counts as stopped after so many seconds."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("FLOAT", {})}})
    RETURN_TYPES = ()
    FUNCTION = "set"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def set(self, seconds):
        for name, module in list(sys.modules.items()):
            if name.endswith(".fastusp_backend.pool.hangs"):
                module.STOPPED_SECONDS = seconds
        return ()


NODES = {"TestQuickMeasuring": QuickMeasuring, "TestStoppedSeconds": StoppedSeconds}
