datacenter = "dc1"
data_dir   = "@DIR@/data"
log_level  = "INFO"

server           = true
bootstrap_expect = 1
ui               = true

bind_addr   = "{{ GetInterfaceIP \"lo\" }}"
client_addr = "127.0.0.1"
encrypt     = "pUqJrVyVRj5jsiYEkM/tFQYfWyJIv4s3XkvDwy7Cu5s="

connect {
  enabled = true
}

ports {
  grpc = 8502
}

performance {
  raft_multiplier = 1
}
