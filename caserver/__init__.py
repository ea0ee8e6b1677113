"""A replicated certificate authority for service meshes that speaks Consul's Connect CA API.

How a request lives, with the modules it passes:

* ``api`` parses it and knows Consul's wire behaviour; ``leaf_cache`` makes service keys and keeps this node's leaves.
* ``forwarding`` carries it to the leader, wherever that is: at most one hop, held while there is no leader.
* ``authority`` decides, on the leader alone and on one state: sign, change the configuration, rotate, prune. It asks a
  ``providers`` instance to make keys and signatures, and proposes exactly one command per decision.
* ``raft`` replicates the command (``pysyncobj`` as the engine, made durable and authenticated from outside) and tells the
  exact outcome: committed, certainly not committed, or unknown.
* ``state`` applies it: a pure, total function from state and command to state and result, the same on every node.
* ``pki`` builds and checks certificates; ``internode`` holds what the one cluster secret yields.

Imports point downwards only; ``tests/unit/architecture_test.py`` is the map.
"""
