"""nodes, as far as it shows without a ComfyUI: (file, what, old, new, tests that should notice)."""

CALL_TRACER = "nodes/call_tracer.py"
PROVENANCE = "nodes/provenance.py"
REACHABLE = "nodes/reachable.py"

CHANGES = [
    (
        PROVENANCE,
        "code of another place counts as the original",
        "codes(module).get(function.__code__) == name",
        "codes(module).get(function.__code__) is not None",
        "unit/test_provenance.py",
    ),
    (
        PROVENANCE,
        "a function with other globals counts as the original",
        "function is not None and function.__globals__ is vars(module) and codes",
        "function is not None and codes",
        "unit/test_provenance.py",
    ),
    (
        PROVENANCE,
        "a pack's wrapper is looked through",
        'and hasattr(value, "__wrapped__") and not is_foreign(value.__code__):',
        'and hasattr(value, "__wrapped__"):',
        "unit/test_provenance.py",
    ),
    (
        REACHABLE,
        "what was found unchanged is never looked at again",
        "all(scope.get(name) is value for scope, name, value in known)",
        "True",
        "unit/test_provenance.py",
    ),
    (
        REACHABLE,
        "what no Python function hides is no change",
        "isinstance(value, functools.partial | functools.partialmethod) or",
        "False or",
        "unit/test_provenance.py",
    ),
    (
        CALL_TRACER,
        "finalisers are taken for changes",
        '_ASIDE = {"__del__", ',
        "_ASIDE = {",
        "unit/test_call_tracer.py",
    ),
    (
        CALL_TRACER,
        "what swallows an obstacle hides it",
        "self.found = self.found or text",
        "pass",
        "unit/test_call_tracer.py",
    ),
    (
        CALL_TRACER,
        "builtins in the place of functions are not found",
        "if provenance.code_of(value) is None:\n                    self.fail",
        "if provenance.code_of(value) is self:\n                    self.fail",
        "unit/test_call_tracer.py",
    ),
    (
        "nodes/settings.py",
        "workflows that lack a later option are refused",
        "optional = option.name not in _REQUIRED",
        "optional = False",
        "unit/test_settings.py",
    ),
    (
        "nodes/comfyui.py",
        "a parameter that went is not missed",
        "lacking = [name for name in wanted if name not in has]",
        "lacking = []",
        "unit/test_comfyui.py",
    ),
]
