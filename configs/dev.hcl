# A single node on this machine that keeps its data:  caserver agent -config-file=configs/dev.hcl
# (caserver agent -dev  needs no file at all and keeps nothing.)
datacenter = "dc1"
node_name  = "dev"
data_dir   = ".dev/data"

connect {
  enabled = true
}
