"""What nobody should be able to send: each case by a name of its own, built from a sound request that was then broken."""
