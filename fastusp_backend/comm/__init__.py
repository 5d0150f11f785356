"""How ranks are arranged, which tokens each of them has, and how tensors move between them.

mesh: the axes, the names of ranks and positions, and the one place that makes process groups.
groups: what every process group needs.
shards: which tokens a rank has.
links: what moves, as protocols: Ulysses' exchanges, the ring, the final gather.
collective, peers: the links, over a process group's collectives and over memory that ranks reach. The order of signals
    between peers is written down in peers.
arena, symmetric, staged: that memory; mapped: of the host, as all ranks map it.
block_store: memory from which blocks that travel come; pages: pieces of it that are mapped one behind the other;
    descriptors: how they get from rank to rank.
transport: which of them the ranks of a layout use.
wire: what travels, exact or in 8 bits, and what `wire = auto` means; link_speed measures for it.
"""
