"""Pairs of telephone key tones and the digits dialled."""

import numpy as np

# Frequencies of the keypad rows and columns in Hz (ITU-T Q.23).
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = '123456789*0#'
_RATE = 8_000  # samples per second
_FRAME, _HOP = 256, 200  # samples: 32 ms, every 25 ms
FRAME_SIZE = 50  # channels per frame, 563 to 2,125 Hz


def pairs(part: str, count: int, seed: int = 0) -> tuple[list, list[str]]:
  """Generate numbers of 3 to 8 digits, dialled at random speed with noise.

  Args:
    part: 'train' or 'validation', which use different random numbers.
    count: number of pairs.
    seed: of the random number generator.

  Returns:
    A list of spectra [frames, 50] float32, and a list of digit strings.
  """
  rng = np.random.default_rng([seed, part == 'train'])
  spectra, digits = [], []
  for _ in range(count):
    number = ''.join(map(str, rng.integers(0, 10, rng.integers(3, 9))))
    spectra.append(_spectrum(_dial(number, rng)))
    digits.append(number)
  return spectra, digits


def _dial(number, rng):
  """The waveform of a number, [samples]."""
  pieces = [_silence(rng)]
  for digit in number:
    row, column = divmod(_KEYS.index(digit), 3)
    time = np.arange(int(_RATE * rng.uniform(0.05, 0.15))) / _RATE
    phases = rng.uniform(0, 2 * np.pi, 2)
    tone = sum(
      np.sin(2 * np.pi * hertz * time + phase)
      for hertz, phase in zip(
        (_ROWS[row], _COLUMNS[column]), phases, strict=True
      )
    )
    pieces += [rng.uniform(0.3, 1.0) * tone, _silence(rng)]
  wave = np.concatenate(pieces)
  return wave + rng.normal(0, 0.1, len(wave))


def _silence(rng):
  return np.zeros(int(_RATE * rng.uniform(0.04, 0.12)))


def _spectrum(wave):
  """Log magnitudes of each frame in the band of the keys, [frames, 50]."""
  frames = np.lib.stride_tricks.sliding_window_view(wave, _FRAME)[::_HOP]
  magnitudes = np.abs(np.fft.rfft(frames * np.hanning(_FRAME)))
  first = 18
  return np.log1p(magnitudes[:, first : first + FRAME_SIZE]).astype(np.float32)
