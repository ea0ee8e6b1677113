# The operator mounts both engines and puts the root there; caserver keeps an issuer and a role of its own at INTER. Replace
# ROOT and INTER by root_pki_path and intermediate_pki_path. A rotation to another root path needs the lines of both.
path "auth/token/lookup-self"                { capabilities = ["read"] }
path "auth/token/renew-self"                 { capabilities = ["update"] }
path "sys/capabilities-self"                 { capabilities = ["update"] }
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
