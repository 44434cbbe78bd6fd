"""Banks hold what was put in, map only what was loaded, and cannot be harmed from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from plait.runtime import bank as banks
from plait.runtime.bank import HUGE, Bank, BankError, PrivateFile, drop

PAGE = banks.PAGE


def resident(bank: Bank) -> int:
    """Bytes of a bank's memory that are mapped now, as the kernel counts them."""
    begin = bank.tensor.data_ptr()
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low < begin + bank.nbytes and high > begin
        elif inside and first == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("elements", [HUGE // 4, 3 * PAGE // 4, 5, 100_003])
def test_units_are_what_was_written(tmp_path: Path, elements: int, cached: bool) -> None:
    source = torch.randn(5, elements)
    bank = Bank(tmp_path, iter(source), cached)
    assert (bank.count, bank.unit_bytes, bank.nbytes) == (5, elements * 4, source.nbytes)
    assert torch.equal(bank.tensor, source)
    drop([(bank, 3), (bank, 0), (bank, 4)])
    bank.load(3)
    assert torch.equal(bank.tensor, source)


@pytest.mark.parametrize("unit_bytes", [HUGE, 16 * PAGE])
def test_only_loaded_units_are_resident(tmp_path: Path, unit_bytes: int) -> None:
    bank = Bank(tmp_path, iter(torch.randn(6, unit_bytes // 4)))
    slack = 4 * banks.SMALL  # mapped around what was asked for
    assert resident(bank) <= slack
    bank.load(1)
    bank.load(4)
    assert 2 * unit_bytes <= resident(bank) <= 2 * unit_bytes + slack
    drop([(bank, 1), (bank, 4)])
    assert resident(bank) <= slack


def test_a_unit_alone_goes_as_a_whole(tmp_path: Path) -> None:
    bank = Bank(tmp_path, iter(torch.randn(1, (HUGE + 5 * PAGE) // 4)), alone=True)
    assert resident(bank) <= banks.SMALL
    bank.load(0)
    assert resident(bank) >= bank.nbytes
    drop([(bank, 0)])
    assert resident(bank) == 0


def test_half_types_are_kept(tmp_path: Path) -> None:
    source = torch.randn(3, 7).bfloat16()
    bank = Bank(tmp_path, iter(source))
    assert bank.tensor.dtype == torch.bfloat16 and torch.equal(bank.tensor, source)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    file = PrivateFile(tmp_path)
    assert not list(tmp_path.iterdir())
    assert os.fstat(file.descriptor).st_nlink == 0
    file.close()
    file.close()  # nothing is left to be done


def test_banks_hold_no_descriptors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = [Bank(tmp_path, iter(torch.randn(2, 8))) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) < before + len(kept)


def test_what_is_written_to_the_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    file = PrivateFile(tmp_path)
    file.write(b"\x01" * PAGE)
    file.map().tensor(0, (PAGE,), torch.uint8).zero_()
    assert file.map().tensor(0, (PAGE,), torch.uint8).eq(1).all()


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(BankError, match="cannot make a file"):
        Bank(path, iter(torch.randn(2, 8)))


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(banks.os, "write", full)
    with pytest.raises(BankError, match="No space left"):
        Bank(tmp_path, iter(torch.randn(2, 8)))


def test_nothing_to_keep_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="units"):
        Bank(tmp_path, iter(()))


def test_without_a_file_system_for_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int, **more: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(banks.os, "open", refuse)
    source = torch.randn(2, 8)
    assert torch.equal(Bank(tmp_path, iter(source)).tensor, source)
    assert not list(tmp_path.iterdir())
