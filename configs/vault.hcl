# A single node whose CA keys live in Vault or OpenBao: caserver agent -config-file=configs/vault.hcl
# The token comes from the file vault-token in file_dir; its policy is deploy/vault/policy-managed.hcl. (The directory is
# /etc here so that this example loads anywhere; give it one of its own.)
data_dir = "/var/lib/caserver"

connect {
  enabled     = true
  ca_provider = "vault"
  file_dir    = "/etc"

  ca_config {
    address               = "https://vault.example.com:8200"
    token_file            = "vault-token"
    ca_file               = "ssl/certs/ca-certificates.crt"
    root_pki_path         = "connect-root"
    intermediate_pki_path = "connect-intermediate"
    leaf_cert_ttl         = "72h"
    intermediate_cert_ttl = "8760h"
  }
}
