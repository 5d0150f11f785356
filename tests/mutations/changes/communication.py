"""comm and attention: (file, what, old, new, tests that should notice)."""

SHARDS = "fastusp_backend/comm/shards.py"
PEERS = "fastusp_backend/comm/peers.py"
COLLECTIVE = "fastusp_backend/comm/collective.py"
TRANSPORT = "fastusp_backend/comm/transport.py"
ARENA = "fastusp_backend/comm/arena.py"
USP = "fastusp_backend/attention/usp.py"
LOSSY = "unit/test_lossy_attention.py"
MESH = "fastusp_backend/comm/mesh.py"

CHANGES = [
    (
        TRANSPORT,
        "memory that runs out in one machine's Ulysses group is not told to the others",
        "allocate_together(allocate, self._mesh.sequence) if self._between else allocate()",
        "allocate()",
        "dist/test_short_transport.py",
    ),
    (
        USP,
        "queries of a text that does not attend are what lay there",
        "q[:, : self._text_rows] = 0",
        "pass",
        "unit/test_joint_attention.py",
    ),
    (
        USP,
        "a ring starts before the text's keys and values are there",
        "if before < len(self._projected) == 4:",
        "if before < len(self._projected) == 2:",
        "unit/test_joint_attention.py",
    ),
    (
        "fastusp_backend/attention/trial.py",
        "a package is tried with heads of 128 values, whatever the model has",
        "_TOKENS, *heads, generator",
        "_TOKENS, 2, 128, generator",
        "unit/test_attention_trial.py",
    ),
    (
        "fastusp_backend/attention/flash3.py",
        "the log-sum-exp of 8 bits lacks the keys' mean",
        "return out, lse.add_(heads.shift, alpha=scale)",
        "return out, lse",
        LOSSY,
    ),
    (
        "fastusp_backend/attention/sage.py",
        "SageAttention 2 corrects the log-sum-exp by itself, in 16 bits",
        "    smoothed, shift = smooth(q, k)\n    out, lse",
        "    smoothed, shift = k, smooth(q, k)[1] * 0\n    out, lse",
        LOSSY,
    ),
    (
        "fastusp_backend/attention/sage.py",
        "SageAttention 1 attends to any number of keys",
        "if gives_lse() or keys % _KEYS == 0:",
        "if gives_lse() or keys:",
        LOSSY,
    ),
    (
        "fastusp_backend/attention/local.py",
        "a ring may have a back end without a log-sum-exp",
        "lossy.back_end(choice, device, dtype, heads, ring=ring)",
        "lossy.back_end(choice, device, dtype, heads, ring=False)",
        LOSSY,
    ),
    (
        "fastusp_backend/comm/block_store.py",
        "what was changed stays out of the other ranks' parts",
        "if self._comes(rank):\n                part.copy_(changed",
        "if not self._comes(rank):\n                part.copy_(changed",
        "unit/test_block_waits.py",
    ),
    (
        "fastusp_backend/comm/pages.py",
        "all pieces lie at the first one's place",
        "            start += piece.size\n        return torch.frombuffer",
        "        return torch.frombuffer",
        "unit/test_block_waits.py",
    ),
    (
        SHARDS,
        "a token of padding also where the ranks divide the image",
        "return -(-self.image // self.layout.sequence_ranks)",
        "return self.image // self.layout.sequence_ranks + 1",
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
        TRANSPORT,
        "each Ulysses group of several machines chooses for itself",
        "dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.sequence)",
        "pass",
        "unit/test_closeness.py",
    ),
    (
        TRANSPORT,
        "between machines `wire = auto` measures the link inside them",
        "over = (self._mesh.ring,) if self._between else (self._mesh.sequence, self._make_arena)",
        "over = self._mesh.sequence, self._make_arena",
        "unit/test_closeness.py",
    ),
    (
        PEERS,
        "packed rows are not kept alive while they travel",
        "self._attended, self._leaving = attended, rows_of",
        "self._attended, self._leaving = attended, None",
        "unit/test_in_flight.py",
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
        "without overlap nothing is awaited where it starts",
        "if not self._overlap:\n            self._ulysses.wait()",
        "if not self._overlap:\n            pass",
        "unit/test_joint_attention.py",
    ),
    (
        MESH,
        "ring positions count along the wrong axis",
        "return self.sequence_position // self.layout.ulysses",
        "return self.sequence_position % self.layout.ulysses",
        "unit/test_mesh.py",
    ),
    (
        PEERS,
        "ring_pipeline=False is ignored where ranks read each other's memory",
        "if hop < size - 1 and not pipelined:\n                arena.wait_all()",
        "if hop < size - 1 and not pipelined:\n                pass",
        "unit/test_in_flight.py",
    ),
    (
        PEERS,
        "a signal is given again before all have heard it",
        "self._messages += 1",
        "self._messages += 0",
        "unit/test_peers.py",
    ),
    (
        PEERS,
        "the text's tokens are not awaited",
        "        wait()\n        return self._returned.own.flatten(2)",
        "        return self._returned.own.flatten(2)",
        "unit/test_peers.py",
    ),
    (
        "fastusp_backend/comm/copies.py",
        "rows in one piece of each tensor are taken for one of both",
        "while dims and all(",
        "while dims and any(",
        "unit/test_copies.py",
    ),
    (
        "fastusp_backend/comm/mapped.py",
        "host memory is pinned before its pages are made",
        "    allocate_together(own[:: mmap.PAGESIZE].zero_, group)",
        "    pass",
        "unit/test_mapped.py",
    ),
    (
        PEERS,
        "a block may be overwritten while others read it",
        "arena.wait_signals(self._peers, _DONE)",
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
]
