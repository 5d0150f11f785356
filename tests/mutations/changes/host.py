"""nodes, as far as it shows without a ComfyUI: (file, what, old, new, tests that should notice)."""

CALL_TRACER = "nodes/call_tracer.py"
MEMORY = "nodes/memory.py"
OBSTACLES = "nodes/obstacles.py"
PROVENANCE = "nodes/provenance.py"
REACHABLE = "nodes/reachable.py"
REHEARSAL = "nodes/rehearsal.py"
STATUS = "nodes/status.py"
WEIGHT_PATCHES = "nodes/weight_patches.py"

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
    (
        MEMORY,
        "weights that a request uses leave for another model",
        "if resident and session.pool.busy:",
        "if resident and session.pool is None:",
        "unit/test_nodes_memory.py",
    ),
    (
        MEMORY,
        "weights that stayed are never listed again",
        "self._stayed.add(session.pool)",
        "pass",
        "unit/test_nodes_memory.py",
    ),
    (
        MEMORY,
        "Unload Models takes the weights of a pool that runs",
        "if not pool.busy:\n                    _tried",
        "if pool:\n                    _tried",
        "unit/test_nodes_memory.py",
    ),
    (
        MEMORY,
        "pools on other GPUs make room",
        "set(pool.devices.gpus) & set(session.pool.devices.gpus)",
        "set(pool.devices.gpus) | set(session.pool.devices.gpus)",
        "unit/test_nodes_memory.py",
    ),
    (
        STATUS,
        "an interruption is told as a failure",
        "isinstance(error, model_management.InterruptProcessingException)",
        "error is None",
        "unit/test_nodes_status.py",
    ),
    (
        STATUS,
        "a headline that was covered does not come back",
        "self._covered = True\n        _show(text)",
        "_show(text)",
        "unit/test_nodes_status.py",
    ),
    (
        STATUS,
        "a page sees the texts of another page's prompt",
        'if number == prompt and client and extra.get("client_id") == client:',
        "if number == prompt:",
        "unit/test_nodes_status.py",
    ),
    (
        REHEARSAL,
        "reading by get is not seen",
        "def get(self, key, default=None):\n        self._look(key)\n",
        "def get(self, key, default=None):\n",
        "unit/test_rehearsal.py",
    ),
    (
        REHEARSAL,
        "whatever strength a conditioning has says nothing",
        'key == "strength" and value == 1.0',
        'key == "strength"',
        "unit/test_rehearsal.py",
    ),
    (
        WEIGHT_PATCHES,
        "the strength of the weight before a patch is lost",
        "strength_model=float(strength_model)",
        "strength_model=1.0",
        "unit/test_nodes_weight_patches.py",
    ),
    (
        WEIGHT_PATCHES,
        "the halves that a patch swaps stay as they are",
        "swap_halves=_swaps(function)",
        "swap_halves=False",
        "unit/test_nodes_weight_patches.py",
    ),
    (
        WEIGHT_PATCHES,
        "what cannot be widened is refused when weights change, not when the patch is added",
        "if wide not in (None, shapes[name]) and",
        "if wide == () and",
        "unit/test_nodes_weight_patches.py",
    ),
    (
        OBSTACLES,
        "options that the workers do not know are ignored",
        "foreign = options.keys() - SAMPLERS[name].options.keys()",
        'foreign = options.keys() & {""}',
        "unit/test_obstacles.py",
    ),
    (
        OBSTACLES,
        "schedules with timesteps of their own run in the workers",
        "if not torch.allclose(model_sampling.timestep(sigmas), sigmas * scale):",
        "if scale == 0:",
        "unit/test_obstacles.py",
    ),
    (
        OBSTACLES,
        "a mask that hides words counts as none",
        'or key == "attention_mask" and masks_nothing(value.cond)',
        'or key == "attention_mask"',
        "unit/test_obstacles.py",
    ),
]
