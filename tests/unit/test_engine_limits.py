"""What the engine refuses before it starts: forked threads and configurations that no C integer holds."""

from __future__ import annotations

import dataclasses
import os

import pytest

from isthmus import engine
from isthmus.engine.binding import Workers, cpu_names
from isthmus.engine.part import Rows
from isthmus.protocol.address import address_fault
from isthmus.protocol.errors import EngineError
from tests.native_tools import open_part
from tests.random_model import RandomModel, random_config


@pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_left_waiting() -> None:
    part = open_part(RandomModel("q4"), threads=2)
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, [1, 2, 3]))
    if not (child := os.fork()):
        try:
            part.step(Rows().tokens(sequence, 3, [4]))
        except EngineError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert part.step(Rows().tokens(sequence, 3, [4])).tokens


@pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_frees_pools_whose_threads_it_has_not() -> None:
    pools = [Workers(3) for _ in range(20)]
    if not (child := os.fork()):
        pools.clear()
        own = Workers(2)  # new threads get the stacks that freeing the lost ones would have handled twice
        del own
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    "field", [{"vocab_size": 2**40}, {"norm_eps": -1.0}, {"norm_eps": float("nan")}, {"rope_scale": 0.0}]
)
def test_impossible_numbers(field: dict[str, float]) -> None:
    with pytest.raises(EngineError, match=next(iter(field))):
        dataclasses.replace(random_config(), **field)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:99999", "tcp://127.0.0.1:80abc", "tcp://host", "tcp://host:0"])
def test_ports_that_are_none(address: str) -> None:
    assert "no port" in address_fault(address)
    assert not address_fault("tcp://[::1]:5757")


def test_a_machine_with_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RandomModel()
    monkeypatch.setattr("isthmus.engine.binding.cpu_names", lambda: ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="neither the native engine nor ONNX Runtime"):
        engine.open_part(model, 0, model.config.n_layers)
