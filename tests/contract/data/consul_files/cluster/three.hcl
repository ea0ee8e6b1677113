datacenter       = "dc1"
data_dir         = "@DIR@/data"
server           = true
bootstrap_expect = 3
retry_join       = ["10.0.0.1", "10.0.0.2:8301", "ca3.example.com"]
bind_addr        = "127.0.0.1"
encrypt          = "pUqJrVyVRj5jsiYEkM/tFQYfWyJIv4s3XkvDwy7Cu5s="

connect {
  enabled = true
}

performance {
  raft_multiplier = 1
}
