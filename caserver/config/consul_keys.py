"""Keys of Consul's agent configuration that a caserver node accepts without effect, so that a file can be kept.

A key belongs here only if ignoring it harms nobody. What would protect something (the request filters of
``http_config``) is refused instead: silence would leave a door open.
"""

from __future__ import annotations

# Dotted table ("" is the top level) -> keys. A value of any shape is accepted.
IGNORED: dict[str, frozenset[str]] = {
    "": frozenset(
        """
        acl_enable_key_list_policy advertise_addr_wan advertise_addr_ipv4 advertise_addr_ipv6 advertise_addr_wan_ipv4
        advertise_addr_wan_ipv6 advertise_reconnect_timeout alt_domain audit auto_config auto_encrypt auto_reload_config
        autopilot bootstrap cloud
        cache check check_output_max_size check_update_interval checks config_entries default_query_time
        disable_anonymous_signature disable_coordinates disable_host_node_id disable_http_unprintable_char_filter
        disable_keyring_file disable_remote_exec disable_update_check discard_check_output discovery_max_stale
        dns_config domain enable_agent_tls_for_checks enable_central_service_config enable_debug
        enable_local_script_checks enable_script_checks enable_syslog encrypt experiments encrypt_verify_incoming
        encrypt_verify_outgoing gossip_lan gossip_wan leave_on_terminate license_path locality log_file log_rotate_bytes log_rotate_duration
        log_rotate_max_files max_query_time node_id node_meta non_voting_server partition peering pid_file primary_datacenter
        primary_gateways primary_gateways_interval protocol raft_logstore raft_protocol raft_snapshot_interval
        raft_snapshot_threshold raft_trailing_logs read_replica reconnect_timeout reconnect_timeout_wan recursors
        rejoin_after_leave reporting retry_interval retry_interval_wan retry_max retry_max_wan rpc segment segments serf_lan
        serf_lan_allowed_cidrs serf_wan serf_wan_allowed_cidrs server server_name service services session_ttl_min
        skip_leave_on_interrupt snapshot_agent syslog_facility tagged_addresses telemetry translate_wan_addrs ui ui_config ui_content_path ui_dir
        use_streaming_backend verify_incoming_rpc verify_outgoing verify_server_hostname watches xds
        """.split()  # noqa: SIM905 - ninety quoted words hide the typing mistake that a plain list shows
    ),
    "addresses": frozenset({"dns", "grpc", "grpc_tls"}),
    "acl": frozenset(
        {
            "disabled_ttl",
            "enable_key_list_policy",
            "enable_token_persistence",
            "enable_token_replication",
            "msp_disable_bootstrap",
            "policy_ttl",
            "role_ttl",
            "token_ttl",
        }
    ),
    # A request without a token stays without one: that denies too much rather than too little.
    "acl.tokens": frozenset(
        {
            "agent_master",
            "agent_recovery",
            "config_file_registration",
            "config_file_service_registration",
            "default",
            "dns",
            "managed_service_provider",
            "replication",
        }
    ),
    "connect": frozenset({"enable_mesh_gateway_wan_federation", "enable_serverless_plugin"}),
    "tls": frozenset({"grpc", "internal_rpc"}),
    "tls.defaults": frozenset({"verify_outgoing", "verify_server_hostname"}),
    "tls.https": frozenset({"verify_outgoing", "verify_server_hostname"}),
    "ports": frozenset(
        {
            "dns",
            "expose_max_port",
            "expose_min_port",
            "grpc",
            "grpc_tls",
            "proxy_max_port",
            "proxy_min_port",
            "serf_lan",
            "serf_wan",
            "sidecar_max_port",
            "sidecar_min_port",
        }
    ),
    "performance": frozenset({"grpc_keepalive_interval", "grpc_keepalive_timeout", "leave_drain_time"}),
    "limits": frozenset(
        {
            "https_handshake_timeout",
            "kv_max_value_size",
            "request_limits",
            "rpc_client_timeout",
            "rpc_handshake_timeout",
            "rpc_max_burst",
            "rpc_max_conns_per_client",
            "rpc_rate",
            "txn_max_req_len",
        }
    ),
    "http_config": frozenset({"max_header_bytes", "use_cache"}),
}

# Ways to find other servers, all replaced by peer blocks: meaningless beside them, an error without them.
JOIN_KEYS = ("retry_join", "start_join", "retry_join_wan", "start_join_wan", "bootstrap_expect")

# Keys that open or close a door in older versions of Consul, and how that is written now.
REFUSED: dict[str, str] = {
    "acl_agent_master_token": "the agent has no token of its own making; leave it out",
    "acl_agent_token": "write acl { tokens { agent = ... } }",
    "acl_datacenter": "write acl { enabled = true }; there is one datacenter",
    "acl_default_policy": "write acl { default_policy = ... }",
    "acl_down_policy": "write acl { down_policy = ... }",
    "acl_enforce_version_8": "leave it out: the agent and its nodes are always asked about",
    "acl_master_token": "write acl { tokens { initial_management = ... } }",
    "acl_replication_token": "leave it out: tokens are replicated among the servers anyway",
    "acl_token": "give the anonymous token the policies that it shall have, with caserver acl token update",
    "acl_ttl": "leave it out: every server holds tokens and policies itself",
    "enable_acl_replication": "leave it out: tokens are replicated among the servers anyway",
}
