"""What a machine has, and what replaces what it lacks."""

import pytest
import torch

import device

WHEELS = ["sm_75", "sm_80", "sm_90a", "sm_100", "sm_120"]


@pytest.mark.parametrize("capability, architectures, message", [
    ((8, 6), WHEELS, None), ((9, 0), WHEELS, None), ((12, 0), WHEELS, None), ((8, 9), ["sm_80"], None),
    ((12, 0), ["sm_80", "compute_90"], None), ((9, 0), ["gfx90a", "gfx942"], None), ((5, 2), [], None),
    ((6, 1), WHEELS, "built for 7.5 and above; for older cards there is a build for CUDA 12.6"),
    ((12, 0), ["sm_75", "sm_90"], "built for cards up to 9.0; install a newer one"),
], ids=str)
def test_a_card_that_this_torch_has_no_code_for_is_refused(capability, architectures, message):
    card = torch.device("cuda", 0)
    if message is None:
        device.check_capability(card, capability, architectures)
        return
    with pytest.raises(device.InputError) as error:
        device.check_capability(card, capability, architectures)
    assert f"cuda:0 has compute capability {capability[0]}.{capability[1]}, but" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("capability, dtype", [((7, 0), torch.float16), ((7, 5), torch.float16),
                                               ((6, 1), torch.float32)], ids=str)
def test_cards_without_bfloat16_take_float16_from_volta_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    said = []
    assert device.pick_dtype("bfloat16", torch.device("cuda", 0), False, said.append) is dtype
    assert len(said) == 1 and str(dtype).removeprefix("torch.") in said[0]


def test_the_random_state_of_a_mac_is_saved_and_restored(monkeypatch):
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([5]))
    restored = []
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    state = device.rng_state(torch.device("mps"))
    device.set_rng_state(state, torch.device("mps"))
    assert restored == [torch.tensor([5])]
