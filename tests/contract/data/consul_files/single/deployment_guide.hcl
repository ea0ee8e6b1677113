# The server of a small site, set up after the deployment guide: TLS everywhere, its own address as the one to join.
datacenter     = "site-a"
primary_datacenter = "site-a"
node_name      = "consul-a-1"
data_dir       = "@DIR@/data"
encrypt        = "Luj2FZWwlt8475wD1WtwUQ=="
retry_join     = ["127.0.0.1:8301", "consul-a-1.node.site-a.consul"]
retry_interval = "15s"
ca_file        = "@DIR@/web-ca.pem"
cert_file      = "@DIR@/server.pem"
key_file       = "@DIR@/server-key.pem"

verify_incoming        = true
verify_outgoing        = true
verify_server_hostname = true
tls_min_version        = "tls12"
tls_cipher_suites      = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"

auto_encrypt {
  allow_tls = true
}

server           = true
bootstrap_expect = 1
advertise_addr   = "127.0.0.1"
client_addr      = "127.0.0.1 ::1"

ports {
  http  = 8500
  https = 8501
  dns   = 8600
}

ui_config {
  enabled          = true
  metrics_provider = "prometheus"
  metrics_proxy {
    base_url = "http://prometheus.example.com"
  }
}

telemetry {
  prometheus_retention_time = "30s"
  disable_hostname          = true
}

autopilot {
  cleanup_dead_servers      = true
  last_contact_threshold    = "200ms"
  max_trailing_logs         = 250
  server_stabilization_time = "10s"
}

connect {
  enabled     = true
  ca_provider = "consul"
  ca_config {
    leaf_cert_ttl   = "48h"
    rotation_period = "2160h"
  }
}

performance {
  raft_multiplier  = 1
  leave_drain_time = "5s"
  rpc_hold_timeout = "7s"
}

limits {
  http_max_conns_per_client = 100
  rpc_max_conns_per_client  = 100
  rpc_rate                  = 500
}

dns_config {
  allow_stale = true
  node_ttl    = "5s"
  service_ttl {
    "*" = "30s"
  }
}

node_meta {
  rack = "r1"
}

http_config {
  block_endpoints       = ["/v1/agent/reload"]
  allow_write_http_from = ["127.0.0.0/8", "::1/128"]
  response_headers {
    "X-Site" = "a"
  }
}

service {
  name = "consul-ui"
  port = 8501
  tags = ["ui"]
  check {
    http     = "http://127.0.0.1:8500/ui/"
    interval = "10s"
  }
}

watches = [
  {
    type    = "services"
    handler = "/usr/bin/true"
  }
]
