"""A training server that is killed in the middle of a step: the same bytes after a resume, and no client that waits forever."""

from __future__ import annotations

import signal
import time

import pytest
from serving_process import Server
from tinker_client import IGNORED, KEY, adam, datums, forget_clients, trainer
from training_examples import examples, loaded, trained_model

from mlx_lora.training_server.worker import AdamNumbers, CheckpointFolder, Place

tinker = pytest.importorskip("tinker")
SECONDS = 180
pytestmark = IGNORED
# After the server is back: a client asks again after at most 30 s.
ASKS_AGAIN_S = 35


def begin(folder, root, log, port: int = 0) -> Server:
    arguments = ("--model", folder, "--training", "--model-name", "tiny", "--checkpoints", root / "checkpoints")
    return Server(*arguments, log=log, environment={"MLX_LORA_API_KEY": KEY}, port=port)


def outcome_of(future, seconds: float) -> Exception | None:
    """Return why a request failed, None if it did not; one that is still under way fails the test."""
    try:
        future.result(seconds)
    except TimeoutError:
        raise AssertionError(f"no answer within {seconds:.0f} s") from None
    except Exception as error:
        return error
    return None


@pytest.mark.slow  # the killed server's client asks again after up to 30 s
def test_kill_9_in_a_step_loses_nothing_that_was_saved(tiny_folder, tmp_path):
    def send(model, number: int):
        return model.forward_backward(datums(examples(number)), "cross_entropy"), model.optim_step(adam())

    with begin(tiny_folder, tmp_path, tmp_path / "first") as first:
        old = tinker.ServiceClient(base_url=first.url, api_key=KEY)
        before = trainer(old)
        for number in range(2):
            assert [one.result(SECONDS) for one in send(before, number)]
        path = before.save_state("two").result(SECONDS).path
        waiting = [one for number in range(2, 60) for one in send(before, number)]
        assert waiting[0].result(SECONDS)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(SECONDS)
        port = first.port
    with begin(tiny_folder, tmp_path, tmp_path / "second", port) as second:
        back = time.monotonic()
        client = tinker.ServiceClient(base_url=second.url, api_key=KEY)
        after = client.create_training_client_from_state_with_optimizer(path).result(SECONDS)
        for number in range(2, 4):
            assert [one.result(SECONDS) for one in send(after, number)]
        assert after.save_state("four").result(SECONDS).path == f"tinker://{after.model_id}/weights/four"
        # The client of the killed server is told that its model is gone; so are its requests that were never sent.
        first_left = next(one for one in waiting if not one.future().done() or one.future().exception() is not None)
        assert outcome_of(first_left, max(1.0, back + ASKS_AGAIN_S - time.monotonic())) is not None
        failed = [one for one in waiting if outcome_of(one, SECONDS) is not None]
        assert failed, "the kill came after the last step"
        assert all("unknown here" in str(outcome_of(one, 0)) for one in failed)
        client.close("success").result(SECONDS)
        with pytest.raises(tinker.NotFoundError):
            old.close("errored").result(SECONDS)
        assert second.stop() == 0
        forget_clients()
        assert "Traceback" not in second.text

    whole, folder = trained_model(loaded(tiny_folder), move_b=False), CheckpointFolder(tmp_path / "whole", "tiny")
    for number in range(4):
        whole.forward_backward(examples(number), "cross_entropy", {})
        whole.optim_step(AdamNumbers(1e-2, 0.9, 0.95, 1e-8))
    place = Place.of(f"{'0' * 32}:train:0", "weights", "four")
    folder.save(whole, place, {})
    found = tmp_path / "checkpoints" / after.model_id.replace(":", ".") / "weights" / "four"
    wanted = tmp_path / "whole" / place.run.replace(":", ".") / "weights" / "four"
    for name in ("state.safetensors", "adapters.safetensors"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    two = tmp_path / "checkpoints" / before.model_id.replace(":", ".") / "weights" / "two"
    assert (two / "adapters.safetensors").read_bytes() != (wanted / "adapters.safetensors").read_bytes()
