"""The file of tokens: made, read, refused, read again when it changes; rates."""

import os
import stat
from pathlib import Path

import pytest

from byol_serving.errors import InvalidConfig, Overloaded, Unauthenticated
from byol_serving.tokens import Scope, Token, Tokens, add_token, new_token, read_tokens


def add(path: Path, name: str, rate: float | None = None, burst: float | None = None) -> str:
    secret, digest = new_token()
    scopes: frozenset[Scope] = frozenset({"read", "write"})
    token = Token(name=name, sha256=digest, scopes=scopes, rate=rate, burst=burst)
    add_token(path, token)
    return secret


def test_what_is_added_is_found_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    first, second = add(path, "alice", rate=2.5, burst=5), add(path, "bob@site.org")
    assert first != second
    assert len(first) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text()
    tokens = Tokens(path)
    found = tokens.find(first)
    assert (found.name, found.rate, found.burst) == ("alice", 2.5, 5.0)
    assert sorted(found.scopes) == ["read", "write"]
    assert tokens.find(second).name == "bob@site.org"
    for wrong in ("", first[:-1], first.upper(), "ü" * 10):
        with pytest.raises(Unauthenticated, match="not known here"):
            tokens.find(wrong)
    with pytest.raises(InvalidConfig, match="has a token 'alice' already"):
        add(path, "alice")
    with pytest.raises(InvalidConfig, match="token name 'a b'"):
        add(path, "a b")


GOOD = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "is not TOML"),
        ("a = 1", "entry 'a': is not a table"),
        (f'[a]\nsha256 = "{GOOD}"\nscopes = ["read"]\nkey = 1', "unknown keys key"),
        ('[a]\nsha256 = "secret"\nscopes = ["read"]', "64 hexadecimal digits"),
        (f'[a]\nsha256 = "{GOOD}"', "scopes None"),
        (f'[a]\nsha256 = "{GOOD}"\nscopes = ["root"]', "out of read, write, admin"),
        (f'[a]\nsha256 = "{GOOD}"\nscopes = ["read"]\nrate = 0', "rate 0 is not a number over 0"),
    ],
)
def test_a_file_that_is_not_so_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        read_tokens(path)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        read_tokens(tmp_path / "none")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("byol_serving.tokens.time.monotonic", lambda: now)
    path = tmp_path / "tokens.toml"
    first = add(path, "alice")
    tokens = Tokens(path)
    second = add(path, "bob")
    now += 2
    assert tokens.find(second).name == "bob"
    path.write_text("[broken")
    os.utime(path, (1, 1))
    now += 2
    assert tokens.find(first).name == "alice"
    path.write_text("")
    now += 2
    with pytest.raises(Unauthenticated):
        tokens.find(first)


def test_a_rate_fills_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("byol_serving.tokens.time.monotonic", lambda: now)
    path = tmp_path / "tokens.toml"
    tokens_of = {name: add(path, name, rate=2.0, burst=3) for name in ("alice", "bob")}
    tokens = Tokens(path)
    alice, bob = (tokens.find(secret) for secret in tokens_of.values())
    for _ in range(3):
        tokens.charge(alice)
    with pytest.raises(Overloaded, match="'alice' is over its rate of 2 requests a second") as full:
        tokens.charge(alice)
    assert full.value.retry_after_s == pytest.approx(0.5)
    tokens.charge(bob)  # has a bucket of its own
    now += 0.5
    tokens.charge(alice)
    with pytest.raises(Overloaded):
        tokens.charge(alice)
    now += 100
    for _ in range(3):
        tokens.charge(alice)
    with pytest.raises(Overloaded):
        tokens.charge(alice)


def test_processes_that_share_a_folder_share_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("byol_serving.tokens.time.monotonic", lambda: now)
    path = tmp_path / "tokens.toml"
    secret, other = (add(path, name, rate=2.0, burst=3) for name in ("alice", "bob"))
    one, two = Tokens(path, tmp_path), Tokens(path, tmp_path)
    alice = one.find(secret)
    assert [each.spend(alice) for each in (one, two, one, two)] == [0, 0, 0, 0.5]
    assert two.spend(two.find(other)) == 0
    now += 0.5
    assert [each.spend(alice) for each in (two, one)] == [0, 0.5]
    late = Tokens(path, tmp_path)  # does not begin with a full bucket
    assert late.spend(alice) == 0.5
