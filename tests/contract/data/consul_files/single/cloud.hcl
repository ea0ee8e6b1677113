# One server per datacenter in a cloud; it would find others by their tags, and expects none.
server           = true
bootstrap_expect = 1
datacenter       = "eu-west-1"
data_dir         = "@DIR@/data"
bind_addr        = "0.0.0.0"
advertise_addr   = "{{ GetInterfaceIP \"lo\" }}"
client_addr      = "127.0.0.1 {{ GetAllInterfaces | include \"name\" \"^lo$\" | include \"type\" \"IPv4\" | join \"address\" \" \" }}"
retry_join       = ["provider=aws tag_key=consul tag_value=server"]
encrypt          = "cg8StVXbQJ0gPvMd9o7yrg=="

connect {
  enabled = true
}

default_intention_policy = "deny"

peering {
  enabled = true
}

raft_logstore {
  backend = "wal"
}

reporting {
  license {
    enabled = false
  }
}

rpc {
  enable_streaming = true
}

use_streaming_backend = true
