from __future__ import annotations

import ipaddress

import pytest

from caserver.config.interfaces import Interface, expand, interfaces_here


def interface(name: str, address: str, *, default: bool = False) -> Interface:
    return Interface(name, ipaddress.ip_address(address), default)


MACHINE = [
    interface("lo", "127.0.0.1"),
    interface("lo", "::1"),
    interface("eth0", "fd00::5", default=True),
    interface("eth0", "10.1.2.3", default=True),
    interface("eth0", "fe80::1", default=True),
    interface("eth1", "192.168.7.8"),
    interface("ppp0", "8.8.4.4", default=True),
]


@pytest.mark.parametrize(
    ("template", "result"),
    [
        ('{{ GetInterfaceIP "eth1" }}', "192.168.7.8"),
        ('{{GetInterfaceIP "eth0"}}', "10.1.2.3"),
        ('{{ GetInterfaceIPs "lo" }}', "127.0.0.1 ::1"),
        ("{{ GetPrivateIP }}", "10.1.2.3"),
        ("{{ GetPrivateIPs }}", "10.1.2.3 192.168.7.8 fd00::5"),
        ("{{ GetPublicIP }}", "8.8.4.4"),
        ("127.0.0.1 {{ GetPrivateIP }}", "127.0.0.1 10.1.2.3"),
        ('{{ GetPrivateInterfaces | include "network" "10.0.0.0/8" | attr "address" }}', "10.1.2.3"),
        ('{{ GetAllInterfaces | include "name" "^eth" | exclude "type" "IPv6" | join "address" " " }}', "10.1.2.3 192.168.7.8"),
        ('{{ GetAllInterfaces | include "address" "^192" | limit 1 | attr "address" }}', "192.168.7.8"),
        ('{{ GetDefaultInterfaces | sort "address" | attr "address" }}', "8.8.4.4"),
        ("no template", "no template"),
    ],
)  # fmt: skip
def test_a_template_gives_what_the_machine_has(template: str, result: str) -> None:
    assert expand(template, MACHINE) == result


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ('{{ GetInterfaceIP "eth9" }}', "gives no address on this machine"),
        ("{{ GetPublicIPs }}", "gives no address on this machine"),
        ('{{ env "HOME" }}', "is no template that is understood here"),
        ("{{ GetPrivateInterfaces }}", 'gives interfaces, not addresses; end it with | attr "address"'),
        ('{{ GetAllInterfaces | math "network" "+1" }}', "is no template that is understood here"),
        ('{{ GetAllInterfaces | include "network" "x" | attr "address" }}', "does not appear to be an IPv4 or IPv6"),
        ("{{ }}", "an empty template gives no address"),
    ],
)
def test_a_template_that_gives_nothing_is_named(template: str, fault: str) -> None:
    machine = [each for each in MACHINE if not each.public]

    with pytest.raises(ValueError, match=r".") as caught:
        expand(template, machine)

    assert fault in str(caught.value)


def test_this_machine_has_a_loopback() -> None:
    assert expand('{{ GetInterfaceIP "lo" }}', interfaces_here()) == "127.0.0.1"
