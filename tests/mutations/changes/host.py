"""nodes, as far as it shows without a ComfyUI: (file, what, old, new, tests that should notice)."""

CALL_TRACER = "nodes/call_tracer.py"
MEMORY = "nodes/memory.py"
OBSTACLES = "nodes/obstacles.py"
PROVENANCE = "nodes/provenance.py"
REACHABLE = "nodes/reachable.py"
REHEARSAL = "nodes/rehearsal.py"
STATUS = "nodes/status.py"
WATCHING = "nodes/watching.py"
WEIGHT_PATCHES = "nodes/weight_patches.py"

CHANGES = [
    (
        "nodes/planning.py",
        "GPUs over PCIe are taken to share weights",
        'peers = settings.weights == "shared" or card is not None and link is CARDS[card].nvlink',
        "peers = True",
        "unit/test_nodes_planning.py",
    ),
    (
        "nodes/planning.py",
        "what travels in 8 bits is predicted as if it were exact",
        "CARDS[card], settings.linear, settings.wire)",
        "CARDS[card], settings.linear)",
        "unit/test_nodes_planning.py",
    ),
    (
        "nodes/measuring.py",
        "workers that had to leave stay away after an error",
        "            again.callback(_start_again, pool)\n",
        "",
        "unit/test_nodes_measuring.py",
    ),
    (
        "nodes/measuring.py",
        "8 bits are compared with what is in 8 bits",
        "exact = plan.base.without_loss()",
        "exact = plan.base",
        "unit/test_nodes_measuring.py",
    ),
    (
        WATCHING,
        "a page that is gone is told for ever",
        "if not _connected(client)]:",
        "if False]:",
        "unit/test_nodes_watching.py",
    ),
    (
        WATCHING,
        "lines of a log are sent again and again",
        "lines, watch.log.from_line = await",
        "lines, _ = await",
        "unit/test_nodes_watching.py",
    ),
    (
        WATCHING,
        "the driver is asked for pages that show no panel",
        "if not any(watch.panel for watch in _watches.values()) or not",
        "if not",
        "unit/test_nodes_watching.py",
    ),
    (
        STATUS,
        "seconds that pages count themselves are sent as a change",
        ' if key != "phase_seconds"}',
        "}",
        "unit/test_nodes_status.py",
    ),
    (
        "nodes/answers.py",
        "other sites may stop pools where they send no Origin",
        'return fetched in ("same-origin", "none")',
        "pass",
        "unit/test_nodes_control.py",
    ),
    (
        "nodes/control.py",
        "memory is released in the middle of a run",
        'if pool.status()["state"] in ("busy", "stopping"):',
        "if False:",
        "unit/test_nodes_control.py",
    ),
    (
        "fastusp_backend/pool/account.py",
        "a run that has ended still shows its steps",
        "        finally:\n            if not self.sampling:\n                self._turn(None)\n",
        "",
        "unit/test_account.py",
    ),
    (
        "nodes/fewer_gpus.py",
        "of guided models only one prompt counts",
        "else (1, 2)",
        "else (1,)",
        "unit/test_fewer_gpus.py",
    ),
    (
        PROVENANCE,
        "code of another place counts as the original",
        "codes(module).get(function.__code__) == name",
        "codes(module).get(function.__code__) is not None",
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
        "if known is not None and _still_there(known):",
        "if known is not None:",
        "unit/test_provenance.py",
    ),
    (
        CALL_TRACER,
        "what swallows an obstacle hides it",
        "self.found = self.found or text",
        "pass",
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
        MEMORY,
        "weights that a request uses leave for another model",
        "if resident and session.pool.busy:",
        "if resident and session.pool is None:",
        "unit/test_nodes_memory.py",
    ),
    (
        MEMORY,
        "Unload Models takes the weights of a pool that runs",
        "if not pool.busy:\n                    _logged_failure",
        "if pool:\n                    _logged_failure",
        "unit/test_nodes_memory.py",
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
        "a text is cut short though a mask counts its tokens",
        'if "attention_mask" in conds or not isinstance',
        "if not isinstance",
        "unit/test_rehearsal.py",
    ),
    (
        "nodes/remote_loop.py",
        "a run is sent before its rehearsal though the last one found something",
        "transformer.unobstructed = found is None",
        "transformer.unobstructed = True",
        "unit/test_remote_loop.py",
    ),
    (
        "fastusp_backend/pool/request.py",
        "a run goes on unrehearsed",
        "        call(meanwhile)\n",
        "",
        "unit/test_request.py",
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
        "what cannot be widened is refused when weights change, not when the patch is added",
        "if wide not in (None, shapes[name]) and",
        "if wide == () and",
        "unit/test_nodes_weight_patches.py",
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
        "a mask that the loop cannot honour counts as none",
        'if "c_crossattn" in given and text_length(given, transformer) is not None:',
        'if "c_crossattn" in given:',
        "unit/test_obstacles.py",
    ),
    (
        "nodes/text_masks.py",
        "a hole in a text counts as its end",
        "known.all() and at_end.all() and lengths.all()",
        "known.all() and lengths.all()",
        "unit/test_nodes_text_masks.py",
    ),
]
