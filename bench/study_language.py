"""The study's language models.

AWD-LSTM: Merity et al., arXiv:1708.02182. QRNN: Bradbury et al., arXiv:1611.01576.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

State = tuple[Tensor, ...]


def locked_dropout(steps: Tensor, p: float, training: bool) -> Tensor:
    """Drops the same elements of [T, B, H] at every time step: variational dropout (Gal and Ghahramani,
    arXiv:1512.05287)."""
    return steps * dropout(torch.ones_like(steps[:1]), p, training)


class DroppedEmbedding(nn.Embedding):
    """An embedding that drops whole words, the same ones in the whole batch: word numbers [T, B] to [T, B, H]."""

    def __init__(self, words: int, size: int, p: float) -> None:
        super().__init__(words, size)
        self.p = p
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, words: Tensor) -> Tensor:
        kept = dropout(torch.ones_like(self.weight[:, :1]), self.p, self.training)
        return nn.functional.embedding(words, self.weight) * nn.functional.embedding(words, kept)


class WeightDropLSTM(nn.Module):
    """One LSTM layer with dropout on its hidden-to-hidden weights, the same for the whole sequence (DropConnect).

    Maps [T, B, inputs] to [T, B, outputs].
    """

    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__()
        self.p = p
        bound = outputs**-0.5
        self.weight_ih = nn.Parameter(torch.empty(4 * outputs, inputs).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(4 * outputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * outputs))

    def begin(self, batch: int) -> State:
        zeros = self.bias.new_zeros(1, batch, self.weight_hh.shape[1])
        return zeros, zeros

    def forward(self, steps: Tensor, state: State) -> tuple[Tensor, State]:
        # torch.lstm takes the weights as arguments. nn.LSTM keeps a list of them and can miss one that is replaced.
        weight_hh = dropout(self.weight_hh, self.p, self.training)
        weights = [self.weight_ih, weight_hh, self.bias, torch.zeros_like(self.bias)]
        output, h, c = torch.lstm(steps, state, weights, True, 1, 0.0, self.training, False, False)
        return output, (h, c)


def fo_pool(z: Tensor, forget: Tensor, output: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """c_t = f_t c_{t-1} + (1 - f_t) z_t and h_t = o_t c_t.

    z, forget, output: [T, B, H]. c: [B, H], the cell before the first step. Returns h [T, B, H] and the last c.
    """
    cells = []
    for z_t, f_t in zip(z.unbind(), forget.unbind(), strict=True):
        c = torch.lerp(z_t, c, f_t)
        cells.append(c)
    return output * torch.stack(cells), c


class QRNN(nn.Module):
    """One quasi-recurrent layer: gates from a causal convolution over `window` words, fo-pooling, and zoneout on the
    forget gate. Maps [T, B, inputs] to [T, B, outputs]."""

    def __init__(self, inputs: int, outputs: int, window: int, zoneout: float) -> None:
        super().__init__()
        self.inputs, self.outputs, self.window, self.zoneout = inputs, outputs, window, zoneout
        self.gates = nn.Linear(window * inputs, 3 * outputs)

    def begin(self, batch: int) -> State:
        zeros = self.gates.bias.new_zeros
        return zeros(batch, self.outputs), zeros(self.window - 1, batch, self.inputs)

    def forward(self, steps: Tensor, state: State) -> tuple[Tensor, State]:
        c, before = state
        past = torch.cat([before, steps])
        seen = torch.cat([past[lag : lag + len(steps)] for lag in range(self.window)], dim=-1)
        z, forget, output = self.gates(seen).chunk(3, dim=-1)
        # A unit that is zoned out keeps its cell. So 1 - f is dropped, without the usual scaling.
        through = torch.sigmoid(-forget)
        if self.training and self.zoneout:
            through = through * (torch.rand_like(through) >= self.zoneout)
        elif self.zoneout:
            through = through * (1 - self.zoneout)
        h, c = fo_pool(torch.tanh(z), 1 - through, torch.sigmoid(output), c)
        return h, (c, past[len(steps) :])


class LanguageModel(nn.Module):
    """Embedding, recurrent layers with locked dropout around them, and a decoder that shares the embedding's weights.

    words: int64 [T, B]. Returns the logits [T, B, V], the last layer's output before and after its dropout, both
    [T, B, H], and the state for the next words.
    """

    def __init__(
        self,
        layers: list[WeightDropLSTM] | list[QRNN],
        words: int,
        size: int,
        embedding_p: float = 0.05,
        input_p: float = 0.2,
        hidden_p: float = 0.1,
        output_p: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = DroppedEmbedding(words, size, embedding_p)
        self.recurrent = nn.ModuleList(layers)
        self.bias = nn.Parameter(torch.zeros(words))
        self.input_p, self.hidden_p, self.output_p = input_p, hidden_p, output_p

    def begin(self, batch: int) -> list[State]:
        return [layer.begin(batch) for layer in self.recurrent]  # type: ignore[operator]

    def read(self, words: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """The last layer's output before its dropout, and the state for the next words."""
        steps = locked_dropout(self.embedding(words), self.input_p, self.training)
        after: list[State] = []
        for number, (layer, state) in enumerate(zip(self.recurrent, states, strict=True)):
            if number:
                steps = locked_dropout(steps, self.hidden_p, self.training)
            steps, state = layer(steps, state)
            after.append(tuple(part.detach() for part in state))
        return steps, after

    def decode(self, hidden: Tensor) -> Tensor:
        """Maps [..., H] to logits [..., V]."""
        return linear(hidden, self.embedding.weight, self.bias)

    def forward(self, words: Tensor, states: list[State]) -> tuple[Tensor, Tensor, Tensor, list[State]]:
        raw, after = self.read(words, states)
        dropped = locked_dropout(raw, self.output_p, self.training)
        return self.decode(dropped), raw, dropped, after


def awd_lstm(words: int, size: int, layers: int) -> LanguageModel:
    return LanguageModel([WeightDropLSTM(size, size, p=0.3) for _ in range(layers)], words, size)


def qrnn(words: int, size: int, layers: int) -> LanguageModel:
    """The window is two words in the first layer and one in the others, as in the AWD-QRNN of Merity et al.,
    arXiv:1803.08240."""
    return LanguageModel([QRNN(size, size, 1 if number else 2, zoneout=0.1) for number in range(layers)], words, size)


def activation_penalty(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor:
    """AR and TAR: alpha times the mean square of the output after dropout, plus beta times the mean square of the
    differences between consecutive outputs before dropout."""
    return alpha * dropped.square().mean() + beta * (raw[1:] - raw[:-1]).square().mean()


def streams(words: Tensor, batch: int) -> Tensor:
    """Reshapes words [N] to [N // batch, batch]. Each column is a contiguous part of the text; the remainder is cut."""
    length = len(words) // batch
    return words[: length * batch].view(batch, length).t().contiguous()


@torch.no_grad()
def outputs(model: LanguageModel, words: Tensor, bptt: int = 500) -> Tensor:
    """The last layer's output [N, H] for each word of a text [N], read as one stream in evaluation mode."""
    model.eval()
    states, read = model.begin(1), []
    for part in words[:, None].split(bptt):
        hidden, states = model.read(part, states)
        read.append(hidden[:, 0])
    return torch.cat(read)


@torch.no_grad()
def cross_entropy(model: LanguageModel, words: Tensor, batch: int = 10, bptt: int = 70) -> float:
    """Mean negative log-probability of the next word, in nats. Evaluates bptt words at a time, to save memory."""
    model.eval()
    columns = streams(words, batch).to(model.bias.device)
    states, total = model.begin(batch), 0.0
    for here, there in zip(columns[:-1].split(bptt), columns[1:].split(bptt), strict=True):
        logits, _, _, states = model(here, states)
        total += nn.functional.cross_entropy(logits.flatten(0, 1), there.flatten(), reduction="sum").item()
    return total / columns[1:].numel()
