import base64

import pytest

from caserver.errors import Corrupt
from caserver.internode.keyring import Keyring, Sealed, decode_secret, sealed_key_id

OLD, NEW = bytes(32), bytes([1]) * 32
NONCE = bytes(12)


class TestDecodeSecret:
    def test_thirty_two_bytes_of_base64(self) -> None:
        assert decode_secret(base64.b64encode(NEW).decode()) == NEW

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "holds 0 bytes"),
            (base64.b64encode(bytes(16)).decode(), "holds 16 bytes"),
            (base64.b64encode(bytes(33)).decode(), "holds 33 bytes"),
            ("hunter2 hunter2!", "not base64"),
            ("ä" * 44, "not base64"),
        ],
    )
    def test_anything_else_is_refused_with_a_remedy_and_without_the_value(self, text: str, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            decode_secret(text)

        assert "caserver keygen" in str(caught.value)
        assert "hunter2" not in str(caught.value)


class TestSealing:
    def test_a_value_opens_for_the_purpose_that_it_was_sealed_for(self) -> None:
        ring = Keyring([OLD])
        sealed = ring.seal(b"a private key", purpose="root key", nonce=NONCE)

        assert ring.open(sealed, purpose="root key") == b"a private key"
        assert bytes(sealed).find(b"private") == -1
        assert sealed_key_id(sealed) == ring.key_ids[0]

    def test_it_opens_for_no_other_purpose(self) -> None:
        ring = Keyring([OLD])
        sealed = ring.seal(b"a private key", purpose="root key", nonce=NONCE)

        with pytest.raises(Corrupt, match=r"\(token\) does not open"):
            ring.open(sealed, purpose="token")

    def test_no_altered_value_opens(self) -> None:
        ring = Keyring([OLD])
        sealed = ring.seal(b"key", purpose="root key", nonce=NONCE)
        for at in range(len(sealed)):
            altered = Sealed(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
            with pytest.raises(Corrupt):
                ring.open(altered, purpose="root key")

    @pytest.mark.parametrize("length", [0, 7, 8, 19, 20, 35])
    def test_no_shortened_value_opens(self, length: int) -> None:
        ring = Keyring([OLD])
        sealed = ring.seal(b"key", purpose="root key", nonce=NONCE)

        with pytest.raises(Corrupt):
            ring.open(Sealed(sealed[:length]), purpose="root key")

    def test_a_nonce_is_twelve_bytes(self) -> None:
        with pytest.raises(ValueError, match="12 bytes"):
            Keyring([OLD]).seal(b"", purpose="x", nonce=b"short")


class TestChangingTheSecret:
    def test_the_first_secret_seals_and_all_open(self) -> None:
        former = Keyring([OLD]).seal(b"key", purpose="p", nonce=NONCE)
        ring = Keyring([NEW, OLD])

        assert ring.open(former, purpose="p") == b"key"
        assert sealed_key_id(ring.seal(b"key", purpose="p", nonce=NONCE)) == Keyring([NEW]).key_ids[0]
        assert ring.key_ids == Keyring([NEW]).key_ids + Keyring([OLD]).key_ids

    def test_a_key_that_is_not_held_is_named_with_those_that_are(self) -> None:
        former = Keyring([OLD])
        ring = Keyring([NEW])

        with pytest.raises(Corrupt, match="cluster_secret list") as caught:
            ring.open(former.seal(b"key", purpose="p", nonce=NONCE), purpose="p")
        assert former.key_ids[0] in str(caught.value)
        assert ring.key_ids[0] in str(caught.value)

    def test_a_keyring_holds_a_key(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Keyring([])


class TestDerivedKeys:
    def test_they_are_the_same_on_every_node_and_differ_by_use(self) -> None:
        first, second = Keyring([OLD]), Keyring([OLD])
        keys = [first.ca_keys[0], first.node_key("n1"), first.node_key("n2"), Keyring([NEW]).node_key("n1")]
        scalars = [key.private_numbers().private_value for key in keys]

        assert len(set(scalars)) == len(keys)
        assert second.node_key("n1").private_numbers() == keys[1].private_numbers()
        assert second.ca_keys[0].private_numbers() == keys[0].private_numbers()
        assert [key.key_size for key in keys] == [256] * len(keys)

    def test_what_is_derived_stays_so_across_releases(self) -> None:
        """Another derivation would lock every cluster out of its own data."""
        ring = Keyring([OLD])

        assert ring.key_ids == ("9c2e72cd2121dd7b",)
        assert ring.ca_keys[0].public_key().public_numbers().x >> 192 == 0x857233629B34613
        assert ring.node_key("n1").public_key().public_numbers().x >> 192 == 0xB62D849A1D661C03
        assert (
            ring.seal(b"key", purpose="p", nonce=NONCE).hex()
            == "9c2e72cd2121dd7b0000000000000000000000006ff47112d567b30dd5b2de7554ad48f6560544"
        )

    def test_no_repr_shows_a_key(self) -> None:
        assert "node_seed" not in repr(Keyring([OLD])._all[0])
