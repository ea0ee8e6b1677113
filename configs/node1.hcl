# Server 1 of three. Only node_name differs between the three files.
datacenter = "dc1"
node_name  = "ca1"
data_dir   = "/var/lib/caserver"

# One secret for all servers, from `caserver keygen`. Better in the environment: CASERVER_CLUSTER_SECRET.
# cluster_secret = "..."

# The same blocks on every server, this one included: what the others dial.
peer "ca1" {
  address = "10.0.0.1"
}
peer "ca2" {
  address = "10.0.0.2"
}
peer "ca3" {
  address = "10.0.0.3"
}

# Address that this server binds for its peers; the API stays on loopback unless client_addr says otherwise.
bind_addr = "0.0.0.0"
# client_addr = "0.0.0.0"
# cert_file   = "/etc/caserver/tls/server.crt"
# key_file    = "/etc/caserver/tls/server.key"

connect {
  enabled = true

  # Seeds the CA when the cluster starts for the first time; later changes go through
  # PUT /v1/connect/ca/configuration or `caserver connect ca set-config`.
  ca_config {
    leaf_cert_ttl = "72h"
  }
}
