# A single node that is spoken to through a Unix socket on its own machine, and over HTTPS from elsewhere once the
# certificates are there: caserver agent -config-file=configs/socket.hcl
# CONSUL_HTTP_ADDR=unix:///var/lib/caserver/http.sock caserver connect ca roots
data_dir = "/var/lib/caserver"

addresses {
  http  = "127.0.0.1 unix:///var/lib/caserver/http.sock"
  https = "0.0.0.0"
}

unix_sockets {
  mode  = "0660"
  group = "root"
}

# cert_file              = "/etc/caserver/tls/server.pem"
# key_file               = "/etc/caserver/tls/server-key.pem"
# ca_file                = "/etc/caserver/tls/clients-ca.pem"
# verify_incoming        = true
# `caserver reload` takes over new files of these names, and serves on.

connect {
  enabled = true
}
