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
        "fastusp_backend/worker/launch.py",
        "ranks see no GPU, as torchrun's process does",
        "        show_gpus()\n",
        "",
        "unit/test_launch.py",
    ),
    (
        "fastusp_backend/worker/nearby.py",
        "torch has threads for processors that a rank may not use any more",
        "torch.set_num_threads(min(torch.get_num_threads(), len(near)))",
        "pass",
        "unit/test_nearby.py",
    ),
    (
        "fastusp_backend/engine/evaluation.py",
        "an evaluation knows itself while the rest of its graphs is to be captured",
        "stages = self._stages()\n                self._head,",
        "stages = self._kept = self._stages()\n                self._head,",
        "unit/test_first_block.py",
    ),
    (
        REQUESTS,
        "prompts of two lengths count as evaluated in one go",
        "return one == other",
        "return one.keys() == other.keys()",
        "unit/test_requests.py",
    ),
    (
        CHANNEL,
        "frames of any length are taken",
        "if length > most:",
        "if length > 1 << 40:",
        "unit/test_channel.py unit/test_control.py",
    ),
    (
        CHANNEL,
        "more may lie in a frame than it says",
        "whole = len(data) >= end if carrier == _INLINE else len(data) == end",
        "whole = len(data) >= end",
        "unit/test_channel_refusals.py",
    ),
    (
        SHARED,
        "shared memory need not be sealed",
        "if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:",
        "if fcntl.fcntl(fd, fcntl.F_GET_SEALS) < 0:",
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
        AGREEMENT,
        "buffers stay when memory ran out",
        "self._engine.drop_evaluations()\n                if not any(others):",
        "if True:",
        "unit/test_runner.py",
    ),
    (
        AGREEMENT,
        "what fits but beside another layout's evaluations is refused",
        'others = self._crew.all_gather("yes" if self._engine.shares_memory else "")',
        "others = []",
        "unit/test_runner.py",
    ),
    (
        REQUESTS,
        "noise of any number of draws is taken",
        "if noise.shape != (draws, *x.shape):",
        "if noise.shape[1:] != x.shape:",
        "unit/test_requests.py",
    ),
    (
        CACHE,
        "what is to be forgotten stays",
        "self._tensors.pop(number, None)",
        "pass",
        "unit/test_prompt_cache.py",
    ),
    (
        CACHE,
        "each evaluation makes another prompt of the same tensors",
        "return self._prompts.setdefault(key, prompt)",
        "return prompt",
        "unit/test_prompt_cache.py",
    ),
    (
        PULSE,
        "the time that a rank asked for is forgotten",
        "self._seconds = seconds\n        self._floats",
        "pass\n        self._floats",
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
        "unit/test_pace.py",
    ),
]
