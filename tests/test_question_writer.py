"""Problems that the policy writes: how, which are taken, and a whole run."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from o1jax import build, iterate, metrics
from o1jax import mesh as mesh_lib
from o1jax.checkpoint import Checkpoints
from o1jax.question_generator import QuestionGenerator, variance_score
from o1jax.question_writer import QuestionWriter
from policies import countdown, greedy_text, tiny_config, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

TASK = countdown()
# Seeds of parameters with which the likeliest text ends soon, or does not.
ENDS, DOES_NOT_END = 45, 1


def make_writer(policy=None, num_texts=3, batch_size=2):
  return QuestionWriter(
    policy or tiny_policy(),
    TASK,
    mesh_lib.make_mesh({}),
    batch_size=batch_size,
    num_texts=num_texts,
  )


def test_texts_are_written_behind_the_mark_and_end_in_their_room():
  policy, network = tiny_policy(), tiny_policy().network

  def sharp_logits(params, hidden):
    return 1000 * network.policy_logits(params, hidden)

  # One that draws what is likeliest.
  sharp = dataclasses.replace(
    policy, network=network._replace(policy_logits=sharp_logits)
  )
  writer = make_writer(sharp)
  params = network.init(jax.random.key(ENDS))
  room = policy.lengths.prompt_tokens
  text, ends = greedy_text(policy, params, TASK.question_mark, room)
  assert ends and text != greedy_text(policy, params, "1 2 = 3", room)[0]
  assert writer.write(params, jax.random.key(0), 3) == [text] * 9
  # What is cut off is no problem, though a beginning of it may look like one.
  params = network.init(jax.random.key(DOES_NOT_END))
  assert writer.write(params, jax.random.key(0), 3) == [""] * 9


def test_texts_are_drawn_and_depend_on_the_key_alone():
  writer = make_writer()
  params = tiny_policy().network.init(jax.random.key(ENDS))
  first, again, other = (
    writer.write(params, jax.random.key(seed), 4) for seed in (1, 1, 2)
  )
  assert first == again != other and len(first) == 12
  # Neither the texts for one problem nor those for different ones are alike.
  assert len(set(first[:3])) > 1 and first[:3] != first[3:6]


def propose(texts, n, seed=0, known_ids=(), writer=None, rates=None):
  """What is proposed where a policy writes these texts."""
  questions = QuestionGenerator(TASK, temperature=0.0)
  sampled = TASK.sample_problems(np.random.default_rng(9), 100)
  questions.learn(sampled, [p.data["target"] / 99 for p in sampled])
  writer = writer or make_writer()
  writer.write = lambda params, key, count: texts
  rng = np.random.default_rng(seed)
  return questions, *writer.propose(questions, None, None, rng, n, known_ids)


def test_the_most_promising_new_problems_are_taken():
  drawn = TASK.sample_problems(np.random.default_rng(1), 60)
  drawn = list({problem.id: problem for problem in drawn}.values())
  known, new = drawn[:20], drawn[20:]
  texts = [problem.prompt.strip() for problem in drawn]
  ids = {problem.id for problem in known}
  questions, problems, report = propose(texts, 10, known_ids=ids)
  scores = variance_score(questions.predict(new))
  best = sorted(zip(-scores, range(len(new)), strict=True))[:10]
  assert [p.id for p in problems] == [new[i].id for _, i in best]
  assert report["filled"] == 0 and report["well_formed"] == 1
  assert report["new"] == report["kept"] == len(new) / len(drawn)


@pytest.mark.parametrize("num_good", [0, 1, 3])
def test_the_sampler_fills_up_what_is_missing(num_good):
  good = TASK.sample_problems(np.random.default_rng(2), num_good)
  texts = [*(one.prompt for one in good), "", "2 2 2 = 99", "question:", "7"]
  _, problems, report = propose(texts, 4)
  assert len(problems) == 4 and report["filled"] == 1 - num_good / 4
  assert {one.id for one in good} == {p.id for p in problems[:num_good]}
  assert all(map(TASK.is_train, problems))
  assert set(report) == {
    "well_formed", "solvable", "trainable", "like_training", "new",
    "frontier", "kept", "filled",
  }  # fmt: skip


def test_what_is_held_out_never_passes_however_it_is_written():
  heldout = TASK.heldout_problems(40)
  texts = [problem.prompt for problem in heldout]
  texts += [
    f" {','.join(map(str, p.data['numbers'][::-1]))}=0{p.data['target']}"
    for p in heldout
  ]
  _, problems, report = propose(texts, 8)
  assert report["solvable"] == 1 and report["kept"] == 0
  assert report["filled"] == 1 and all(map(TASK.is_train, problems))


def test_a_problem_whose_prompt_has_no_room_is_not_taken():
  # Of the kind of training problems, and yet longer than those tried.
  longest = max(
    TASK.sample_problems(np.random.default_rng(3), 500),
    key=lambda problem: len(tiny_policy().tokenizer.encode(problem.prompt)),
  )
  writer = make_writer()
  size = len(tiny_policy().tokenizer.encode(longest.prompt))
  for room, filled in ((size, 0.5), (size - 1, 1.0)):
    lengths = tiny_policy().lengths._replace(prompt_tokens=room)
    writer._policy = dataclasses.replace(tiny_policy(), lengths=lengths)
    assert propose([longest.prompt], 2, writer=writer)[2]["filled"] == filled


def test_lengths_without_room_for_a_problem_are_refused():
  lengths = tiny_policy().lengths._replace(prompt_tokens=7)
  policy = dataclasses.replace(tiny_policy(), lengths=lengths)
  words = "lengths.prompt_tokens=7 is too short for problems that the policy"
  with pytest.raises(ValueError, match=words):
    make_writer(policy)


def test_the_form_comes_first_and_then_what_was_searched(tmp_path):
  config, mesh = make_config(), mesh_lib.make_mesh({"data": 2})
  parts = build.build(config, tmp_path, mesh)
  mark = parts.policy.tokenizer.encode(TASK.question_mark)
  (regime,) = parts.regimes.values()
  # Nothing was searched yet.
  for maker, count in ((parts.initialize_rows, 16), (regime.learn_rows, 0)):
    rng = np.random.default_rng(0)
    batch, _ = maker.batches(rng, parts.experience, 1)
    is_question = (batch.tokens[0, :, : len(mark)] == mark).all(-1)
    assert is_question.sum() == count


def make_config():
  return tiny_config(
    "questions.source=policy",
    # Of 96 texts this policy writes about ten can be solved.
    "questions.pool_factor=16",
    "initialize.rows.questions=16",
    "learn.rows.questions=8",
    "learn.rows.openings=0",
    "learn.optimizer.name=adamw",
    "learn.optimizer.weight_decay=0.02",
    "initialize.num_updates=90",
    "num_iterations=3",
    "tokenizer.vocab_size=400",
    "search.strategy=best_of_n",
    "evaluation.strategies=()",
    "evaluation.interval=0",
    "checkpoint.keep_every=1",
  )


def test_a_run_writes_its_problems_and_resumes_with_the_same_bits(
  tmp_path, capsys
):
  workdir = tmp_path / "run"
  proposed, known, keys = [], [], []
  propose = QuestionWriter.propose

  def watched(writer, questions, params, key, rng, n, known_ids):
    problems, report = propose(
      writer, questions, params, key, rng, n, known_ids
    )
    proposed.append([problem.id for problem in problems])
    known.append(known_ids)
    keys.append(jax.random.key_data(key).tolist())
    return problems, report

  config = make_config()
  parts = build.build(config, workdir, mesh_lib.make_mesh({"data": 2}))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(QuestionWriter, "propose", watched)
    # Its programs are compiled once; what was learned comes from the files.
    patch.setattr(build, "build", lambda *_: parts)
    expected = iterate.run(config, workdir)
    rows = metrics.read_jsonl(workdir / "metrics.jsonl")
    assert "questions/kept" not in rows[0] and len(proposed) == 3
    for row in rows[1:]:
      assert row["questions/well_formed"] > 0.3
      assert row["questions/kept"] > 0
      assert row["questions/filled"] < 1
    # It takes something else each time, and nothing of what it knows.
    assert proposed[0] != proposed[1] != proposed[2]
    assert keys[0] != keys[1] != keys[2] != keys[0]
    assert not known[0] and known[0] < known[1] < known[2]
    saves = workdir / "checkpoints"
    arrays = Checkpoints(saves).restore(3, expected).host
    assert arrays["question_num_learned"] == [3 * 6]
    for step in ("2", "3"):
      shutil.rmtree(saves / step)
    resumed = iterate.run(config, workdir)
  assert "resuming after iteration 1" in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, resumed, expected)
  assert proposed[3:] == proposed[1:3] and keys[3:] == keys[1:3]
  again = Checkpoints(saves).restore(3, expected).host
  for name, array in arrays.items():
    np.testing.assert_array_equal(again[name], array, err_msg=name)
  for row, old in zip(
    metrics.read_jsonl(workdir / "metrics.jsonl"), rows, strict=True
  ):
    for name in old.keys() - {"seconds"}:
      if "seconds" not in name:
        assert row[name] == old[name], name
