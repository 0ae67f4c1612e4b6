"""The models and the data of bench/study.py, where an error would go unnoticed: dropouts, pooling, the cache pointer,
augmentation, splits."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import study_data
from study_images import WideResNet, averaged_logits, logits, shifted, views
from study_language import QRNN, DroppedEmbedding, WeightDropLSTM, awd_lstm, cross_entropy, fo_pool, locked_dropout
from study_language import outputs as outputs_of
from study_language import qrnn as qrnn_model
from study_pointer import cache_probabilities, mixed, score, tune

# ---- language models

pytestmark = pytest.mark.slow


def lstm_by_hand(steps: Tensor, layer: WeightDropLSTM, weight_hh: Tensor) -> Tensor:
    h = c = torch.zeros(steps.shape[1], weight_hh.shape[1])
    made = []
    for x in steps:
        i, f, g, o = (x @ layer.weight_ih.t() + h @ weight_hh.t() + layer.bias).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        made.append(h)
    return torch.stack(made)


def test_weight_drop_drops_the_same_weights_at_every_time_and_gradients_flow_to_the_rest() -> None:
    torch.manual_seed(0)
    layer, steps = WeightDropLSTM(5, 6, p=0.5), torch.randn(7, 3, 5)
    layer.train()
    torch.manual_seed(1)
    made, _ = layer(steps, layer.begin(3))
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(layer.weight_hh, 0.5)
    torch.testing.assert_close(made, lstm_by_hand(steps, layer, dropped))
    made.sum().backward()
    assert layer.weight_hh.grad is not None
    assert torch.equal(layer.weight_hh.grad == 0, dropped == 0)
    assert 0.2 < (dropped == 0).double().mean() < 0.8

    layer.eval()
    torch.testing.assert_close(layer(steps, layer.begin(3))[0], lstm_by_hand(steps, layer, layer.weight_hh))


def test_locked_dropout_is_the_same_at_every_time_but_not_for_every_text() -> None:
    torch.manual_seed(0)
    made = locked_dropout(torch.ones(9, 4, 50), 0.3, training=True)
    assert torch.equal(made, made[:1].expand_as(made))
    assert not torch.equal(made[0, 0], made[0, 1])
    torch.testing.assert_close(made.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert torch.equal(locked_dropout(made, 0.3, training=False), made)


def test_embedding_dropout_drops_whole_words_everywhere() -> None:
    torch.manual_seed(0)
    embedding = DroppedEmbedding(40, 8, p=0.5).train()
    made = embedding(torch.arange(40).repeat(3, 1))
    gone = (made == 0).all(-1)
    assert torch.equal(gone, gone[:1].expand_as(gone)) and 5 < gone[0].sum() < 35
    torch.testing.assert_close(made[0][~gone[0]], 2 * embedding.weight[~gone[0]])


def test_fo_pooling_against_a_loop_over_elements() -> None:
    torch.manual_seed(0)
    z, forget, output = torch.randn(4, 2, 3), torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    c = torch.randn(2, 3)
    h, last = fo_pool(z, forget, output, c)
    for b in range(2):
        for j in range(3):
            cell = c[b, j].item()
            for t in range(4):
                f = forget[t, b, j].item()
                cell = f * cell + (1 - f) * z[t, b, j].item()
                assert h[t, b, j].item() == pytest.approx(output[t, b, j].item() * cell, abs=1e-6)
            assert last[b, j].item() == pytest.approx(cell, abs=1e-6)


def test_qrnn_gates_see_the_word_and_the_one_before_it_and_no_later_one() -> None:
    torch.manual_seed(0)
    layer, steps = QRNN(3, 4, window=2, zoneout=0.0), torch.randn(6, 2, 3)
    c = torch.zeros(2, 4)
    for t in range(6):
        before = steps[t - 1] if t else torch.zeros(2, 3)
        z, f, o = layer.gates(torch.cat([before, steps[t]], dim=1)).chunk(3, dim=1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        torch.testing.assert_close(layer(steps, layer.begin(2))[0][t], o.sigmoid() * c)


def test_zoneout_keeps_cells_and_has_the_same_mean_at_the_test() -> None:
    torch.manual_seed(0)
    layer, steps = QRNN(3, 500, window=1, zoneout=0.4), torch.randn(1, 1, 3)
    start = torch.full((1, 500), 7.0), layer.begin(1)[1]
    _, (cells, _) = layer.train()(steps, start)
    assert 0.3 < (cells == 7.0).double().mean() < 0.5
    means = torch.stack([layer(steps, start)[1][0] for _ in range(400)]).mean(0)
    torch.testing.assert_close(means, layer.eval()(steps, start)[1][0], atol=1.0, rtol=0)
    assert (means - layer(steps, start)[1][0]).mean().abs() < 0.02


@pytest.mark.parametrize("make", [awd_lstm, qrnn_model])
def test_a_text_read_in_pieces_is_one_text(make: Any) -> None:
    torch.manual_seed(0)
    model, words = make(20, 8, 2), torch.randint(20, (37,))
    whole = outputs_of(model, words, bptt=100)
    torch.testing.assert_close(outputs_of(model, words, bptt=5), whole)
    log_p = model.decode(whole[:-1]).log_softmax(-1)
    expected = torch.nn.functional.nll_loss(log_p, words[1:]).item()
    assert cross_entropy(model, words, batch=1, bptt=5) == pytest.approx(expected, rel=1e-5)


# ---- cache pointer


def test_cache_probabilities_against_a_loop_and_sum_to_one() -> None:
    torch.manual_seed(0)
    hidden, following = torch.randn(30, 4), torch.randint(6, (30,))
    theta, window = 0.7, 8
    made = torch.cat(list(cache_probabilities(hidden, following, 6, theta, window, block=7)))
    assert torch.equal(made[0], torch.zeros(6))
    torch.testing.assert_close(made[1:].sum(1), torch.ones(29))
    for t in range(1, 30):
        expected = torch.zeros(6)
        for i in range(max(0, t - window), t):
            expected[following[i]] += math.exp(theta * hidden[t] @ hidden[i])
        torch.testing.assert_close(made[t], expected / expected.sum())
    both = mixed(torch.full((30, 6), 1 / 6), made, (made.sum(1, keepdim=True) > 0).float(), 0.3)
    torch.testing.assert_close(both.sum(1), torch.ones(30))


def test_the_pointer_helps_on_repeated_text_and_share_0_is_the_model() -> None:
    torch.manual_seed(0)
    words = torch.randint(50, (60,)).repeat(4)
    hidden, following = torch.randn(50, 16)[words[:-1]], words[1:]

    def uniform(block: Tensor) -> Tensor:
        return torch.full((len(block), 50), 1 / 50)

    scored = score(uniform, hidden, following, theta=1.0, window=100)
    assert scored.nats(0.0) == pytest.approx(math.log(50), rel=1e-5)
    assert scored.nats(0.5) < 0.7 * math.log(50)
    theta, share, nats = tune(uniform, hidden, following, window=100)
    assert nats <= score(uniform, hidden, following, theta, 100).nats(share) + 1e-9 < math.log(50)


# ---- images


def test_wide_resnet_refuses_other_depths_and_knows_its_layers() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 4 .* but got 12"):
        WideResNet(12, 1, 1, 10)
    model = WideResNet(16, 2, 1, 10)
    assert sum(p.ndim == 4 and p.shape[-1] == 3 for p in model.parameters()) == 1 + 3 * 2 * 2
    depths = {name.split(".")[0]: model.depth(name) for name, _ in model.named_parameters()}
    assert depths == {"stem": 0, "stages": 3, "norm": 4, "head": 4}
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_shifted_images_are_windows_of_the_padded_ones() -> None:
    images = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(shifted(images, 0, generator, mirror=False), images)
    padded = torch.nn.functional.pad(images, (1,) * 4, mode="replicate")
    moved = shifted(images.repeat(40, 1, 1, 1), 1, generator, mirror=False).view(40, 2, 1, 8, 8)
    places = set()
    for pair in moved:
        for number in range(2):
            found = [
                (down, right)
                for down in range(3)
                for right in range(3)
                if torch.equal(padded[number, :, down : down + 8, right : right + 8], pair[number])
            ]
            assert len(found) == 1
            places.add(found[0])
    assert len(places) == 9


def test_test_time_augmentation_is_the_mean_over_the_views() -> None:
    torch.manual_seed(0)
    model, images = WideResNet(10, 1, 1, 3), torch.randn(5, 1, 8, 8)
    seen = views(images, 1, mirror=True)
    assert len(seen) == 6 and torch.equal(seen[0], images) and torch.equal(seen[1], images.flip(3))
    assert torch.equal(seen[2][:, :, 1:], images[:, :, :-1])
    expected = sum(logits(model, view) for view in seen) / 6
    torch.testing.assert_close(averaged_logits(model, images, 1, mirror=True), expected)


# ---- data


def test_no_digit_is_in_two_splits() -> None:
    data = study_data.digits(10_000)
    parts = [{image.numpy().tobytes() for image in images} for images, _ in (data.train, data.valid, data.test)]
    assert [len(part) for part in parts] == [600, 300, 897]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    few = data.only(range(5, 10)).first(3)
    assert few.train[1].bincount().tolist() == [3] * 5 and few.test[1].unique().tolist() == [0, 1, 2, 3, 4]


def test_no_topic_and_no_paragraph_is_in_two_splits() -> None:
    repeated = "alpha beta gamma\n\ndelta epsilon\n\n====="
    kept = study_data.without_repetition({"long": repeated + "\n\nzeta", "short": "delta epsilon\n\neta"})
    end = study_data.END
    assert kept == {
        "long": ["alpha", "beta", "gamma", end, "delta", "epsilon", end, "zeta", end],
        "short": ["eta", end],
    }
    topics = {f"topic {n}": ["word"] * (10 + n) for n in range(60)}
    train, valid, test = study_data.split_topics(topics)
    assert sorted(train + valid + test) == sorted(topics)
    for part in (valid, test):
        assert 0.1 <= sum(len(topics[name]) for name in part) / sum(map(len, topics.values())) < 0.13

    corpus = study_data.python_topics(300, 10**6)
    assert len(corpus.vocabulary) == 300 and corpus.vocabulary[0] == study_data.UNKNOWN
    assert corpus.train.bincount(minlength=300).min() > 0
    assert len(corpus.train) > 5 * len(corpus.test) > 1000


def test_files_of_wikitext_2_and_cifar_10(tmp_path: Path) -> None:
    for part, text in (("train", " a b a\n"), ("valid", " b a <unk>\n"), ("test", " c a\n")):
        (tmp_path / f"wiki.{part}.tokens").write_text(text)
    corpus = study_data.wikitext2(tmp_path)
    assert corpus.vocabulary == ["<unk>", "a", study_data.END, "b"]
    assert corpus.train.tolist() == [1, 3, 1, 2] and corpus.test.tolist() == [0, 1, 2]

    torch.manual_seed(0)
    pixels = torch.randint(256, (12, 3072), dtype=torch.uint8)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = pixels[2 * number : 2 * number + 2].numpy()
        (tmp_path / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [number, number + 1]}))
    data = study_data.cifar10(tmp_path, valid=4)
    assert [len(part[1]) for part in (data.train, data.valid, data.test)] == [6, 4, 2]
    assert data.valid[1].tolist() == [3, 4, 4, 5] and data.test[1].tolist() == [5, 6]
    torch.testing.assert_close(data.train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    red = pixels[10, :1024].view(32, 32).float()
    assert torch.corrcoef(torch.stack([red.flatten(), data.test[0][0, 0].flatten()]))[0, 1] > 0.9999
    assert study_data.find(tmp_path.parent, "data_batch_1") == tmp_path
