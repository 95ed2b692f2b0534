"""python -m attention plot."""

import attention.__main__ as cli
from attention import plots


def test_plot_draws_attention_patterns(ended, tmp_path, capsys, monkeypatch):
  titles, draw = [], plots.flow

  def flow(*words, title):
    titles.append(title)
    return draw(*words, title=title)

  monkeypatch.setattr(plots, 'flow', flow)
  capsys.readouterr()
  words = ['plot', f'--workdir={ended}']
  for name, more in (('all', []), ('some', ['--layers=1', '--heads=1'])):
    out = tmp_path / name
    more = [*more, f'--out={out}', '--text=the lazy']
    assert cli.main([*words, *more]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [
      str(out / f'attention{end}')
      for end in ('_grid.png', '_pattern.png', '_flow.png', '.html')
    ]
    assert 'gpt/block_1/attention' in (out / 'attention.html').read_text()
  assert titles == [
    'gpt/block_0/attention, head 0',
    'gpt/block_1/attention, head 1',
  ]
  for more, message in (
    (
      ['--text=the lazy', '--layers=2'],
      'layers: expected one of 0: gpt/block_0/att',
    ),
    (['--text=the lazy', '--heads=0,2'], 'heads: expected 0 to 1, got [2]'),
    (['--text=the lazy', '--heads=a'], 'expected comma-separated numbers'),
    (['--text=' + 'the lazy' * 3], 'text: expected at most 16 tokens'),
    (['--text=THE'], "text: symbols 'EHT' are not in the vocabulary"),
    (['--text='], 'text: expected at least one symbol, got none'),
  ):
    assert cli.main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
