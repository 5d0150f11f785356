"""comm and attention: (file, what, old, new, tests that should notice)."""

SHARDS = "fastusp_backend/comm/shards.py"
PEERS = "fastusp_backend/comm/peers.py"
COLLECTIVE = "fastusp_backend/comm/collective.py"
ARENA = "fastusp_backend/comm/arena.py"
USP = "fastusp_backend/attention/usp.py"
MESH = "fastusp_backend/comm/mesh.py"

CHANGES = [
    (
        SHARDS,
        "a token of padding also where the ranks divide the image",
        "return -(-self.image // self.layout.sequence_ranks)",
        "return self.image // self.layout.sequence_ranks + 1",
        "unit/test_shards.py",
    ),
    (
        SHARDS,
        "text is padded behind instead of in front",
        "sequence_position * self.local_text - self._text_padding, self.local_text",
        "sequence_position * self.local_text, self.local_text",
        "unit/test_shards.py",
    ),
    (
        SHARDS,
        "padding of the image is attended",
        "image_count = min(u * self.local_image, max(0, self.image - first * self.local_image))",
        "image_count = u * self.local_image",
        "unit/test_shards.py",
    ),
    (
        SHARDS,
        "image regions of a Ulysses group overlap its text",
        "start = u * t + ulysses_position * i",
        "start = t + ulysses_position * i",
        "unit/test_shards.py",
    ),
    (
        COLLECTIVE,
        "a rank's heads come back in the order of batch items",
        "return arrived.permute(1, 2, 0, 3, 4).flatten(2)",
        "return arrived.permute(1, 2, 3, 0, 4).flatten(2)",
        "unit/test_joint_attention.py dist/test_usp_parity.py",
    ),
    (
        COLLECTIVE,
        "what arrived lands over the own rows",
        "if source == self.position:",
        "if source == -1:",
        "unit/test_joint_attention.py dist/test_usp_parity.py",
    ),
    (
        COLLECTIVE,
        "ring_pipeline does nothing: each block is awaited before attention",
        "arrived = arriving() if arriving and not pipelined else None",
        "arrived = arriving() if arriving else None",
        "unit/test_in_flight.py",
    ),
    (
        COLLECTIVE,
        "blocks are taken for those of the ranks ahead",
        "yield (position - hop) % size, current",
        "yield (position + hop) % size, current",
        "dist/test_usp_parity.py",
    ),
    (
        PEERS,
        "packed rows are not kept alive while they travel",
        "self._attended, self._leaving = attended, rows_of",
        "self._attended, self._leaving = attended, None",
        "unit/test_in_flight.py",
    ),
    (
        PEERS,
        "no signal follows what was sent",
        "self._arena.put_signal(self._members[target], channel)",
        "pass",
        "unit/test_peers.py",
    ),
    (
        PEERS,
        "all messages share a channel",
        "channel, tensors = _FIRST_SEND + len(self._in_flight), range(*which.indices(3))",
        "channel, tensors = _FIRST_SEND, range(*which.indices(3))",
        "unit/test_peers.py",
    ),
    (
        ARENA,
        "regions of an arena are not aligned",
        "_ALIGNMENT = 256",
        "_ALIGNMENT = 1",
        "unit/test_arena.py",
    ),
    (
        USP,
        "ring parts are merged in the compute type",
        "merged = out.float().contiguous(), lse.contiguous()",
        "merged = out.contiguous(), lse.contiguous()",
        "unit/test_joint_attention.py",
    ),
    (
        USP,
        "padding of other ring positions is attended",
        "valid = self._valid[position]\n            if",
        "valid = slice(0, k.shape[1])\n            if",
        "unit/test_joint_attention.py dist/test_usp_parity.py",
    ),
    (
        USP,
        "without overlap nothing is awaited where it starts",
        "if not self._overlap:\n            self._ulysses.wait()",
        "if not self._overlap:\n            pass",
        "unit/test_joint_attention.py",
    ),
    (
        USP,
        "the softmax's scale is that of half a head",
        "self._ulysses.received.shape[-1] ** -0.5",
        "(self._ulysses.received.shape[-1] // 2) ** -0.5",
        "unit/test_oracle.py",
    ),
    (
        MESH,
        "ring positions count along the wrong axis",
        "return self.sequence_position // self.layout.ulysses",
        "return self.sequence_position % self.layout.ulysses",
        "unit/test_mesh.py",
    ),
    (
        "fastusp_backend/attention/local.py",
        "the log-sum-exp is of base 2",
        "lse = scores.logsumexp(-1)",
        "lse = scores.logsumexp(-1) * 1.4426950408889634",
        "unit/test_attention.py",
    ),
    (
        "fastusp_backend/planner.py",
        "a ring before Ulysses",
        "for u in range(ranks, 0, -1) if",
        "for u in range(1, ranks + 1) if",
        "unit/test_planner.py",
    ),
    (
        "fastusp_backend/planner.py",
        "fewest batch groups first",
        "for batch in (b for b in range(ranks, 1, -1) if ranks % b == 0):",
        "for batch in (b for b in range(2, ranks + 1) if ranks % b == 0):",
        "unit/test_planner.py",
    ),
    (
        PEERS,
        "ring_pipeline=False is ignored where ranks read each other's memory",
        "if not pipelined:\n                    arena.wait_all()",
        "if not pipelined:\n                    pass",
        "unit/test_in_flight.py",
    ),
    (
        PEERS,
        "a block may be overwritten while others read it",
        "arena.wait_signal(self._members[other], _DONE)",
        "pass",
        "unit/test_peers.py",
    ),
    (
        "fastusp_backend/comm/wire.py",
        "auto packs for the fast links",
        "link_speed < FAST_LINK",
        "link_speed > FAST_LINK",
        "unit/test_wire.py",
    ),
    (
        "fastusp_backend/comm/wire.py",
        "a row's own heads are left where packed ones were",
        "out[:, rows, position * heads : (position + 1) * heads] = attended[:, region]",
        "pass",
        "unit/test_peers.py",
    ),
]
