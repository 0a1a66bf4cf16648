"""Signatures: what a trusted key has not signed is neither decoded, nor opened, nor deserialised."""

import base64
import os
import resource

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from app.ai.model_bundle import load_bundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.model_signature import ManifestSignature, build_key_id, sign_manifest, verify_manifest
from app.errors import ArtifactError, SigningKeyError
from app.training.signing import make_key_file, read_key_file, sign_models
from tests.model_files import V1, V2, forge, manifest_of, publish, sign, signature_of

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC, OTHER_PUBLIC = (key.public_key().public_bytes_raw() for key in (KEY, OTHER_KEY))
MANIFEST = b'{"a": 1}\n'


def refusal(act):
    with pytest.raises(ArtifactError) as caught:
        act()
    return caught.value.reason


# The signature itself


def test_a_signature_holds_for_the_bytes_and_the_key_it_was_made_with():
    signature = sign_manifest(MANIFEST, KEY)
    assert verify_manifest(MANIFEST, signature, [PUBLIC]) == build_key_id(PUBLIC)
    assert verify_manifest(MANIFEST, signature, [OTHER_PUBLIC, PUBLIC]) == build_key_id(PUBLIC)


def test_any_ed25519_tool_can_check_a_signature():
    content = msgspec.json.decode(sign_manifest(MANIFEST, KEY))
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(bytes.fromhex(content["signature"]), MANIFEST)


def test_no_bit_of_manifest_or_signature_can_be_changed():
    signature = sign_manifest(MANIFEST, KEY)
    for position in range(8 * len(MANIFEST)):
        assert refusal(lambda at=position: verify_manifest(flip(MANIFEST, at), signature, [PUBLIC]))
    for position in range(8 * len(signature)):
        changed = flip(signature, position)
        assert refusal(lambda data=changed: verify_manifest(MANIFEST, data, [PUBLIC])) == "signature_invalid"
    for length in range(len(signature)):
        cut = signature[:length]
        assert refusal(lambda data=cut: verify_manifest(MANIFEST, data, [PUBLIC])) == "signature_invalid"


def flip(data, position):
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def test_the_signature_of_a_key_that_is_not_trusted_counts_for_nothing_under_any_name():
    forged = msgspec.json.decode(sign_manifest(MANIFEST, OTHER_KEY), type=ManifestSignature)
    renamed = msgspec.json.encode(msgspec.structs.replace(forged, key_id=build_key_id(PUBLIC)))
    for signature in (msgspec.json.encode(forged), renamed):
        reason = refusal(lambda data=signature: verify_manifest(MANIFEST, data, [PUBLIC]))
        assert reason == "signature_invalid"


# The registry


@pytest.fixture
def models(tmp_path):
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


@pytest.fixture
def loads():
    return []


@pytest.fixture
def open_catalogue(models, loads):
    def load(manifest, data):
        loads.append(manifest.version)
        return load_bundle(manifest, data)

    return lambda *trusted: ModelCatalogue(models, trusted_keys=trusted, load=load)


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
def test_a_signed_model_serves(models, open_catalogue, loads, fmt):
    publish(models, V1, fmt=fmt, signing_key=KEY)
    assert ModelRegistry(open_catalogue(PUBLIC)).load().ref.version == V1
    assert loads == [V1]


def replace_file_and_hash(artifact):
    forge(artifact, data=b"\x80\x04N.")


def as_symlink(path):
    real = path.with_name("real")
    path.rename(real)
    path.symlink_to(real.name)


TAMPERING = {
    "no signature": (lambda artifact: signature_of(artifact).unlink(), "signature_missing"),
    "another key": (lambda artifact: sign(artifact, OTHER_KEY), "signature_invalid"),
    "file and hash replaced": (replace_file_and_hash, "signature_invalid"),
    "a threshold changed": (lambda artifact: forge(artifact, threshold=0.1), "signature_invalid"),
    "signature of another model": (
        lambda artifact: signature_of(artifact).write_bytes(sign_manifest(MANIFEST, KEY)),
        "signature_invalid"),
    "empty signature": (lambda artifact: os.truncate(signature_of(artifact), 0), "signature_invalid"),
    "no JSON": (lambda artifact: signature_of(artifact).write_bytes(b"\xff"), "signature_invalid"),
    "a huge signature": (lambda artifact: signature_of(artifact).write_bytes(bytes(2000)), "size_mismatch"),
    "a link": (lambda artifact: as_symlink(signature_of(artifact)), "not_regular"),
    "signature writable by everybody": (
        lambda artifact: signature_of(artifact).chmod(0o666), "writable_by_others"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERING)
def test_an_unsigned_or_wrongly_signed_model_is_refused_and_the_last_good_one_serves_on(
    models, open_catalogue, loads, name
):
    tamper, reason = TAMPERING[name]
    publish(models, V1, signing_key=KEY)
    registry = ModelRegistry(open_catalogue(PUBLIC))
    good = registry.load()
    artifact = publish(models, V2, signing_key=KEY)
    tamper(artifact)
    # Were the artifact opened before the signature is checked, it would now be found missing.
    artifact.unlink()
    assert registry.load() is good
    assert registry.status().reason == reason
    assert loads == [V1]


def test_where_no_key_is_trusted_signatures_are_not_looked_at(models, open_catalogue):
    signature_of(publish(models, V1, signing_key=KEY)).write_bytes(b"nonsense")
    (listed,) = open_catalogue().verify_models()
    assert (listed.state, listed.signature, listed.signed_by) == ("verified", "unchecked", None)


def test_a_model_is_picked_up_once_it_is_signed(models, open_catalogue):
    artifact = publish(models, V1)
    catalogue = open_catalogue(PUBLIC)
    assert refusal(lambda: catalogue.load(catalogue.find()[0])) == "signature_missing"
    sign(artifact, OTHER_KEY)
    assert refusal(lambda: catalogue.load(catalogue.find()[0])) == "signature_invalid"
    sign(artifact, KEY)
    assert catalogue.load(catalogue.find()[0]).ref.version == V1


def test_keys_rotate_while_both_are_trusted(models, open_catalogue):
    old, new = publish(models, V1, signing_key=KEY), publish(models, V2, signing_key=OTHER_KEY)
    both = open_catalogue(PUBLIC, OTHER_PUBLIC).verify_models()
    assert [(model.state, model.signed_by) for model in both] == [
        ("verified", build_key_id(OTHER_PUBLIC)),
        ("verified", build_key_id(PUBLIC)),
    ]
    after = open_catalogue(OTHER_PUBLIC).verify_models()
    assert [(model.version, model.signature) for model in after] == [(V2, "valid"), (V1, "invalid")]
    sign(old, OTHER_KEY)
    assert {model.signature for model in open_catalogue(OTHER_PUBLIC).verify_models()} == {"valid"}
    assert new.exists()


def test_the_list_tells_the_state_of_every_signature(models, open_catalogue, loads):
    publish(models, V2, signing_key=KEY)
    os.truncate(publish(models, V1, signing_key=KEY), 100)
    publish(models, V1, "random_forest")
    as_symlink(manifest_of(publish(models, "20250101_120000", signing_key=KEY)))
    signature_of(publish(models, "20240101_120000", signing_key=KEY)).write_bytes(b"")
    registry = ModelRegistry(open_catalogue(PUBLIC))
    registry.load()
    assert loads == [V2]
    for _ in range(2):
        listed = [(model.state, model.reason, model.signature) for model in registry.available()]
        assert listed == [
            ("active", None, "valid"),
            ("refused", "signature_missing", "missing"),
            ("refused", "size_mismatch", "valid"),
            ("refused", "not_regular", "unchecked"),
            ("refused", "signature_invalid", "invalid"),
        ]
    assert loads == [V2]


def test_a_signature_alone_is_no_model(models, open_catalogue):
    artifact = publish(models, V1, signing_key=KEY)
    for path in (artifact, manifest_of(artifact)):
        path.unlink()
    assert open_catalogue(PUBLIC).list_models() == []


# Keys and signing


def test_a_key_file_signs_and_its_public_key_verifies(models, tmp_path, open_catalogue):
    public = make_key_file(tmp_path / "key")
    key = read_key_file(tmp_path / "key")
    assert public == base64.b64encode(key.public_key().public_bytes_raw()).decode()
    publish(models, V1)
    publish(models, V2)
    assert sign_models(models, "advanced_ml_*", V2, key) == [
        f"advanced_ml_logistic_regression_{V2}.manifest.sig"
    ]
    catalogue = open_catalogue(key.public_key().public_bytes_raw())
    assert [model.signature for model in catalogue.verify_models()] == ["valid", "missing"]
    assert len(sign_models(models, "advanced_ml_*", None, key)) == 2
    assert [model.signature for model in catalogue.verify_models()] == ["valid", "valid"]


def test_a_signature_that_cannot_be_written_is_one_clear_line(models):
    artifact = publish(models, V1)
    (signature_of(artifact) / "in the way").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"\.sig cannot be written: is a directory\.") as caught:
        sign_models(models, "advanced_ml_*", None, KEY)
    assert caught.value.reason == "not_writable"
    assert not list(models.glob(".*"))


def test_a_key_is_never_overwritten_nor_made_where_it_cannot_be(tmp_path):
    make_key_file(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    for path in (tmp_path / "key", tmp_path / "nowhere" / "key"):
        with pytest.raises(SigningKeyError, match="cannot be made"):
            make_key_file(path)
    assert (tmp_path / "key").read_bytes() == before


def test_a_key_that_cannot_be_written_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # stands in for a full disk
    try:
        with pytest.raises(SigningKeyError, match="cannot be written"):
            make_key_file(tmp_path / "key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_others_can_read_is_not_used(tmp_path):
    make_key_file(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(SigningKeyError, match="chmod 600"):
        read_key_file(tmp_path / "key")


def test_what_is_no_private_key_of_the_right_kind_is_refused(tmp_path):
    secret = BestAvailableEncryption(b"secret")
    curve = generate_private_key(SECP256R1())
    contents = {
        "passphrase": KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret),
        "no private key": b"",
        "Ed25519": curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for message, content in contents.items():
        path = tmp_path / message
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(SigningKeyError, match=message):
            read_key_file(path)
    with pytest.raises(SigningKeyError, match="cannot be read"):
        read_key_file(tmp_path / "missing")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda artifact: os.truncate(artifact, 100), "size_mismatch"),
        (lambda artifact: manifest_of(artifact).write_bytes(b"{}"), "manifest_invalid"),
    ],
)
def test_nothing_is_signed_when_one_of_the_models_is_not_what_it_says(models, damage, reason):
    publish(models, V1)
    damage(publish(models, V2))
    assert refusal(lambda: sign_models(models, "advanced_ml_*", None, KEY)) == reason
    assert list(models.glob("*.sig")) == []


def test_there_must_be_something_to_sign(models):
    assert refusal(lambda: sign_models(models, "advanced_ml_*", V1, KEY)) == "missing"
