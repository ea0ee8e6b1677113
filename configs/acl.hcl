# One server that asks for tokens. The same acl block belongs on every server of a cluster.
datacenter = "dc1"
node_name  = "single"
data_dir   = "/var/lib/caserver"

acl {
  enabled        = true
  default_policy = "deny"
  down_policy    = "extend-cache"

  # The first management token: its secret, made with uuidgen. Better in the environment,
  # CASERVER_ACL_TOKENS_INITIAL_MANAGEMENT, or left out: `caserver acl bootstrap` then makes one.
  # tokens {
  #   initial_management = "..."
  # }
}

connect {
  enabled = true
}
