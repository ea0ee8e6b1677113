# A single node whose CA starts with the operator's own root instead of a generated one. The key below is published
# here and therefore worthless: make your own, with the cluster's id in the certificate:
#
#   openssl ecparam -name prime256v1 -genkey -noout -out root.key
#   openssl req -x509 -new -key root.key -days 3650 -subj "/CN=Mesh root" -out root.crt \
#     -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,digitalSignature,keyCertSign,cRLSign" \
#     -addext "subjectAltName=URI:spiffe://$(cat /proc/sys/kernel/random/uuid).consul"
#
# A file that holds a key is for its owner only: chmod 600.
datacenter = "dc1"
node_name  = "custom-root"
data_dir   = ".dev/custom-root"

connect {
  enabled     = true
  ca_provider = "consul"

  # Consul's spelling (LeafCertTTL) works as well as this one. The id of the cluster is that of the root's SPIFFE URI.
  ca_config {
    leaf_cert_ttl = "24h"

    private_key = <<-EOF
      -----BEGIN EC PRIVATE KEY-----
      MHcCAQEEIH0C93TuAVNfXp0v8oZ2aT3lAWEAdAJtr56oYAj6MeinoAoGCCqGSM49
      AwEHoUQDQgAEuIMU5Cgqitx3IuDfen25sEOlLLtFkFjwtEi7ORfSKRuREkmW7BJ2
      AXbXtX4f+szvSw3AzVHyNF5rXjfZPbo+9w==
      -----END EC PRIVATE KEY-----
      EOF

    root_cert = <<-EOF
      -----BEGIN CERTIFICATE-----
      MIIB0zCCAXmgAwIBAgIUfaPIg4u/o/Mhs7sp3b91huWH5PIwCgYIKoZIzj0EAwIw
      JTEjMCEGA1UEAwwaRXhhbXBsZSByb290LCBuZXZlciB1c2UgaXQwIBcNMjYxMTIz
      MTMzODA5WhgPMjEyNjEwMzAxMzM4MDlaMCUxIzAhBgNVBAMMGkV4YW1wbGUgcm9v
      dCwgbmV2ZXIgdXNlIGl0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEuIMU5Cgq
      itx3IuDfen25sEOlLLtFkFjwtEi7ORfSKRuREkmW7BJ2AXbXtX4f+szvSw3AzVHy
      NF5rXjfZPbo+96OBhDCBgTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIB
      hjAdBgNVHQ4EFgQUCM7o8Hc5j8v46iuwrz50cpaoUlYwPwYDVR0RBDgwNoY0c3Bp
      ZmZlOi8vMTExMTExMTEtMjIyMi0zMzMzLTQ0NDQtNTU1NTU1NTU1NTU1LmNvbnN1
      bDAKBggqhkjOPQQDAgNIADBFAiAqEhKG6xEDOjZmGVoBNLoET8mvk0xIuDpN3Y5/
      Gs/ibwIhAJnR7goZ0bbiBl1TF+c4Cz+IVwavwrwu90UBFhFDj9Oj
      -----END CERTIFICATE-----
      EOF
  }
}
