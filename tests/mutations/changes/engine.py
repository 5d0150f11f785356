"""engine: (file, what, old, new, tests that should notice)."""

DENOISER = "fastusp_backend/engine/denoiser.py"
PATCHING = "fastusp_backend/engine/patching.py"
PARKING = "fastusp_backend/engine/parking.py"
MODULATIONS = "fastusp_backend/engine/modulations.py"
BLOCK_STREAM = "fastusp_backend/engine/block_stream.py"
FIRST_BLOCK = "fastusp_backend/engine/first_block.py"
HOST_MEMORY = "fastusp_backend/host_memory.py"

CHANGES = [
    (
        "fastusp_backend/engine/evaluation.py",
        "references count for how much the first block's part has changed",
        "shards.unpadded_image(torch.empty(self._tokens), mesh",
        "shards.unpadded_image(torch.empty(shards.image), mesh",
        "unit/test_first_block.py",
    ),
    (
        "fastusp_backend/engine/evaluation.py",
        "a skip counts as an evaluation that has compiled and allocated all",
        "replays = self._captures and self._computed",
        "replays, self._computed = self._captures and self._computed, True",
        "unit/test_first_block.py",
    ),
    (
        FIRST_BLOCK,
        "what no later evaluation may use is kept",
        "if self.timestep <= self.cache.end:",
        "if False:",
        "unit/test_first_block.py",
    ),
    (
        FIRST_BLOCK,
        "a line is followed for as long as evaluations are skipped",
        "alpha=min(max(share, 0.0), 1.0)",
        "alpha=share",
        "unit/test_first_block.py",
    ),
    (
        FIRST_BLOCK,
        "padding counts as tokens",
        "(head.after - head.before)[:, :tokens] - before",
        "(head.after - head.before) - kept.first",
        "unit/test_first_block.py",
    ),
    (
        FIRST_BLOCK,
        "a batch group decides by all groups' prompts",
        "totals = [[sum(column) for column in zip(*ranks[n * each :][:each], strict=True)] for n in range(groups)]",
        "totals = [[sum(column) for column in zip(*ranks, strict=True)] for n in range(groups)]",
        "unit/test_first_block.py",
    ),
    (
        "fastusp_backend/engine/room.py",
        "weights are unpacked into what is to be kept free",
        "<= free - kept:",
        "<= free:",
        "unit/test_unpacked_room.py",
    ),
    (
        "fastusp_backend/engine/room.py",
        "some weights are unpacked into what is to be kept free",
        "room = free - max(kept, kept_packed) - max(",
        "room = free - max(",
        "unit/test_unpacked_room.py",
    ),
    (
        PATCHING,
        "patches change what was unpacked, not the file's form",
        '    if plan.small is not None:\n        return "unpack"\n',
        "",
        "unit/test_unpacked.py",
    ),
    (
        "fastusp_backend/engine/engine.py",
        "unpacked weights stay where they are forbidden",
        "if self._resident is None or self.unpacked:",
        "if self._resident is None:",
        "unit/test_unpacked.py",
    ),
    (
        BLOCK_STREAM,
        "a block does not wait for its weights",
        """            self._join()
            self._await_next(number)
""",
        """            self._await_next(number)
""",
        "unit/test_block_stream.py",
    ),
    (
        BLOCK_STREAM,
        "the first block is not fetched anew after a change",
        """        self._close()
        self._primed, self._waiting = False, []
""",
        """        self._close()
""",
        "unit/test_block_waits.py",
    ),
    (
        BLOCK_STREAM,
        "what was changed in a slot is not given back",
        "self.store.give_back(number, start, end - start)",
        "pass",
        "unit/test_block_stream.py",
    ),
    (
        BLOCK_STREAM,
        "weights are changed while other ranks compute",
        """        self.meet()
        try:
            yield
""",
        """        try:
            yield
""",
        "unit/test_block_waits.py",
    ),
    (
        BLOCK_STREAM,
        "weights are fetched while other ranks change them",
        """        finally:
            self.meet()
""",
        """        finally:
            self._close()
            self._primed = False
""",
        "unit/test_block_waits.py",
    ),
    (
        BLOCK_STREAM,
        "all of a large block comes while its tokens return",
        "self._fetch(self._half if",
        "self._fetch(None if",
        "unit/test_block_stream.py",
    ),
    (
        BLOCK_STREAM,
        "a block comes from the host all at once, in front of tokens",
        "if not self._beside_tokens:",
        "if True:",
        "unit/test_block_stream.py",
    ),
    (
        PATCHING,
        "a change relative to another patch set is made",
        "if base is not None and base != self.number:",
        "if base is not None and self.number is None:",
        "unit/test_patching.py",
    ),
    (
        PARKING,
        "tensors that merely touch are moved as one",
        "if ranges and start < ranges[-1][1]:",
        "if ranges and start <= ranges[-1][1]:",
        "unit/test_parking.py",
    ),
    (
        MODULATIONS,
        "rows of a second batch of timesteps begin where the first ended",
        "row[a - place : b - place] = whole[a - start : b - start]",
        "row[a - place : b - place] = whole[: b - a]",
        "unit/test_denoiser.py dist/test_modulations.py",
    ),
    (
        DENOISER,
        "memory is tried for one image of a batch",
        "WORKING_SET * len(x) * shards.local",
        "WORKING_SET * shards.local",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "the memory of modulations is free again while an evaluation's is tried",
        "_rows = self._modulations.probe_memory(",
        "self._modulations.probe_memory(",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "shapes make room in the order in which they came",
        "self._evaluations.move_to_end(shape)",
        "pass",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "cond's velocity is not cloned before uncond's evaluation",
        "velocity.clone().view_as(mine)",
        "velocity.view_as(mine)",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "a cancel is asked for once a step, not before each evaluation",
        "if velocities:\n                go_on()",
        "if velocities:\n                pass",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "text tokens outlive a change of weights",
        "self._modulations.forget()\n        self._prompts.clear()",
        "self._modulations.forget()",
        "unit/test_denoiser.py",
    ),
    (
        DENOISER,
        "graphs outlive the addresses that they were captured with",
        "self._evaluations.clear()  # their graphs",
        "self._evaluations.keys()  # their graphs",
        "unit/test_denoiser.py",
    ),
    (
        PATCHING,
        "weights that were rounded to fp8 are patched as they are",
        'if plan.rounded_to_fp8:\n        return "from_file"',
        'if plan.rounded_to_fp8:\n        return "in_place"',
        "unit/test_patching.py",
    ),
    (
        PARKING,
        "host room is asked for one rank's shard",
        "if have is not None and wanted * self._ranks > have",
        "if have is not None and wanted > have",
        "unit/test_parking.py",
    ),
    (
        PARKING,
        "a strided tensor ends where its count of values does",
        "return (steps + 1) * tensor.itemsize",
        "return tensor.numel() * tensor.itemsize",
        "unit/test_parking.py",
    ),
    (
        HOST_MEMORY,
        "limits of the groups around a control group do not count",
        "for group in [own, *own.parents]:",
        "for group in [own]:",
        "unit/test_free_host_memory.py",
    ),
    (
        "fastusp_backend/engine/engine.py",
        "memory is freed and counted beside what is still being warmed up",
        "            self._warming.wait()\n",
        "",
        "unit/test_warming.py",
    ),
    (
        "fastusp_backend/engine/warming.py",
        "what cannot be warmed up ends its thread without a word",
        'log.info("warming up failed:", exc_info=True)',
        "pass",
        "unit/test_warming.py",
    ),
    (
        "fastusp_backend/engine/resident.py",
        "parked weights are taken for a file's mapping",
        "if self._mapped and not self.parked:",
        "if self._mapped:",
        "unit/test_file_state.py",
    ),
    (
        "fastusp_backend/engine/evaluation.py",
        "the first reference token takes the image's modulations",
        "(torch.arange(shards.image, device=device) >= self._tokens)",
        "(torch.arange(shards.image, device=device) > self._tokens)",
        "unit/test_oracle_qwen.py",
    ),
]
