"""protocol, worker, pool and what processes need: (file, what, old, new, tests that should notice)."""

CHANNEL = "fastusp_backend/protocol/channel.py"
SHARED = "fastusp_backend/protocol/shared.py"
CONTROL = "fastusp_backend/worker/control.py"
AGREEMENT = "fastusp_backend/worker/agreement.py"
REQUESTS = "fastusp_backend/worker/requests.py"
CACHE = "fastusp_backend/worker/prompt_cache.py"
PULSE = "fastusp_backend/pulse.py"
PORTS = "fastusp_backend/ports.py"

CHANGES = [
    (
        CHANNEL,
        "frames of any length are taken",
        "if length > most:",
        "if length > 1 << 40:",
        "unit/test_channel.py unit/test_control.py",
    ),
    (
        CHANNEL,
        "a frame without a descriptor is read as what came before",
        "return message, SharedTensors(self._memory(fd, lasting=carrier == _LASTING), places)",
        "return message, SharedTensors(self._memory(fd, lasting=True), places)",
        "unit/test_channel.py unit/test_channel_refusals.py",
    ),
    (
        CHANNEL,
        "half a frame is taken for one",
        "if not part:\n                raise EOFError",
        "if not part:\n                break",
        "unit/test_control.py unit/test_channel.py",
    ),
    (
        CHANNEL,
        "tensors on the same memory are sent as they are",
        "t = t.clone() if t.untyped_storage().data_ptr() in storages else t",
        "t = t",
        "unit/test_channel.py",
    ),
    (
        SHARED,
        "shared memory need not be sealed",
        "if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:",
        "if fcntl.fcntl(fd, fcntl.F_GET_SEALS) < 0:",
        "unit/test_channel_refusals.py unit/test_shared.py",
    ),
    (
        SHARED,
        "tensors lie on each other",
        "end = _aligned(end + t.nbytes)",
        "end = _aligned(end)",
        "unit/test_channel_refusals.py unit/test_shared.py",
    ),
    (
        CONTROL,
        "a second client is greeted",
        "elif self._channel is not None:",
        "elif self._channel is self:",
        "unit/test_control.py",
    ),
    (
        CONTROL,
        "what has ended can be cancelled",
        "elif message.id > self._taken or message.id <= self._answered:",
        "elif message.id > self._taken:",
        "unit/test_control.py",
    ),
    (
        CONTROL,
        "strangers are never sent away",
        "timer.start()",
        "pass",
        "unit/test_control.py",
    ),
    (
        AGREEMENT,
        "a mesh is made before another rank's failure is known",
        "if text:\n                result = None",
        "if text and rank == 0:\n                result = None",
        "unit/test_runner.py",
    ),
    (
        AGREEMENT,
        "buffers stay when memory ran out",
        'if refused.kind == "out_of_memory":\n                self._engine.drop_evaluations()',
        'if refused.kind == "out_of_memory":\n                pass',
        "unit/test_runner.py",
    ),
    (
        REQUESTS,
        "a sampler's unknown options are ignored",
        "if unknown := request.options.keys() - sampler.options.keys():",
        "if unknown := request.options.keys() & {'nothing'}:",
        "unit/test_requests.py",
    ),
    (
        REQUESTS,
        "noise of any number of draws is taken",
        "if noise.shape != (draws, *x.shape):",
        "if noise.shape[1:] != x.shape:",
        "unit/test_requests.py",
    ),
    (
        REQUESTS,
        "timesteps are not scaled",
        "timesteps=(evaluated * request.timestep_scale).tolist()",
        "timesteps=evaluated.tolist()",
        "unit/test_requests.py",
    ),
    (
        CACHE,
        "what is to be forgotten stays",
        "self._tensors.pop(number, None)",
        "pass",
        "dist/test_pool_life.py::test_tensors_are_kept_reused_and_forgotten",
    ),
    (
        CACHE,
        "each evaluation makes another prompt of the same tensors",
        "return self._prompts.setdefault(key, prompt)",
        "return prompt",
        "unit/test_requests.py",
    ),
    (
        "fastusp_backend/prompt.py",
        "guidance for all images counts for the first alone",
        't is None or name == "guidance" and len(t) == 1 else',
        "t is None else",
        "unit/test_prompt.py",
    ),
    (
        "fastusp_backend/prompt.py",
        "the second reference is lost",
        "references.append(tensors[name])",
        "references = [tensors[name], *references][:1]; break",
        "unit/test_prompt.py",
    ),
    (
        PULSE,
        "the time that a rank asked for is forgotten",
        "self._seconds = seconds\n        self._floats",
        "pass\n        self._floats",
        "unit/test_hangs.py",
    ),
    (
        PULSE,
        "what a rank turns to is cut in the middle of the one before",
        'text.ljust(_TEXT.stop - _TEXT.start, b"\\0")',
        'text.ljust(_TEXT.stop - _TEXT.start, b" ")',
        "unit/test_hangs.py",
    ),
    (
        PORTS,
        "gloo's ports stay open",
        "listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _FILTER)",
        "pass",
        "unit/test_ports.py",
    ),
    (
        "fastusp_backend/engine/pace.py",
        "the limit follows the shortest of the last evaluations",
        "TIMES_LONGER * max(self._seconds)",
        "TIMES_LONGER * min(self._seconds)",
        "unit/test_hangs.py",
    ),
]
