# caserver mounts the engines and generates the root where there is none. Replace ROOT and INTER by root_pki_path and
# intermediate_pki_path. A rotation to another root path needs the lines of the old and of the new one until it is over.
path "auth/token/lookup-self"                { capabilities = ["read"] }
path "auth/token/renew-self"                 { capabilities = ["update"] }
path "sys/capabilities-self"                 { capabilities = ["update"] }
path "sys/mounts/ROOT"                       { capabilities = ["read", "update"] }
path "sys/mounts/INTER"                      { capabilities = ["read", "update", "delete"] }
path "ROOT/root/generate/internal"           { capabilities = ["update"] }
path "ROOT/issuer/+/sign-intermediate"       { capabilities = ["update"] }
path "ROOT/intermediate/cross-sign"          { capabilities = ["update"] }
path "INTER/roles/caserver-*"                { capabilities = ["update"] }
path "INTER/intermediate/generate/internal"  { capabilities = ["update"] }
path "INTER/intermediate/generate/existing"  { capabilities = ["update"] }
path "INTER/intermediate/set-signed"         { capabilities = ["update"] }
path "INTER/issuer/+/sign/caserver-*"        { capabilities = ["update"] }
path "INTER/config/issuers"                  { capabilities = ["update"] }
path "INTER/keys"                            { capabilities = ["list"] }
path "INTER/issuer/+"                        { capabilities = ["delete"] }
path "INTER/key/+"                           { capabilities = ["delete"] }
