"""Other people's on-policy steps, each in a process of its own.

`on_policy.py` starts this file with the peer's name and the shape, under the
Python that has the peer. Nothing of o1jax is imported but for "plain_jax". The
peer trains by its own loop; its reward function waits on standard input for
its turn and answers, on what was standard output, with the seconds since the
turn before.
"""

import collections
import importlib.metadata
import json
import os
import sys
import tempfile
import time

NUM_PROMPTS = 256  # distinct ones of TRL's data set


class Turns:
  """Called once a step, by the reward function."""

  def __init__(self, clock: str, package: str):
    self._now = time.process_time if clock == "cpu" else time.perf_counter
    self._begin = None
    self._package = package
    # What a library prints is not an answer.
    self._answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

  def answer(self, **fields) -> None:
    print(json.dumps(fields), file=self._answers, flush=True)

  def wait(self) -> None:
    """Answers, and returns when it is this peer's turn again."""
    if self._begin is None:
      self.answer(version=importlib.metadata.version(self._package))
    else:
      self.answer(seconds=self._now() - self._begin)
    if not sys.stdin.readline():
      os._exit(0)  # Nobody asks for more; the peer's loop has no such end.
    self._begin = self._now()


def reward(texts) -> list[float]:
  return [float(len(text) % 2 == 0) for text in texts]


def plain_jax(c, turns: Turns) -> None:
  """What one writes first in JAX and optax: naive sampling, whole scores.

  Rows are updated on once, so the ratios need no log-probs of the sampler.
  """
  import functools

  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  import peers

  params = peers.naive_params(c, jax.random.key(0))
  rule = optax.adamw(1e-4)
  state = rule.init(params)

  def log_probs(params, rows):
    batch, length = rows.shape
    empty = jnp.zeros((batch, length, c.num_kv_heads, c.head_width))
    x = params["embedding"][rows]
    for i in range(c.num_layers):
      layer = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
      x, _ = peers.block(c, x, (layer, empty, empty), 0)
    logits = peers.norm(x[:, c.prompt - 1 : -1]) @ params["head"]
    return -optax.softmax_cross_entropy_with_integer_labels(
      logits, rows[:, c.prompt :]
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, rows, rewards):
    groups = rewards.reshape(-1, c.group)
    mean, std = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
    advantages = ((groups - mean) / (std + 1e-4)).reshape(-1, 1)

    def loss(params):
      new = log_probs(params, rows)
      ratios = jnp.exp(new - jax.lax.stop_gradient(new))
      clipped = jnp.clip(ratios, 0.8, 1.2)
      gains = jnp.minimum(ratios * advantages, clipped * advantages)
      return -gains.mean()

    value, grads = jax.value_and_grad(loss)(params)
    changes, state = rule.update(grads, state, params)
    return optax.apply_updates(params, changes), state, value

  rng = np.random.default_rng(0)
  calls = 0
  while True:
    calls += 1
    prompts = rng.integers(1, c.vocab_size, (c.prompts, c.prompt), np.int32)
    prompts = np.repeat(prompts, c.group, axis=0)
    key = jax.random.key(calls)
    drawn = np.asarray(peers.naive_tokens(c, params, prompts, key, c.new)).T
    texts = [" ".join(map(str, row)) for row in drawn.tolist()]
    turns.wait()
    rows = np.concatenate([prompts, drawn], axis=1)
    rewards = np.array(reward(texts), np.float32)
    params, state, value = update(params, state, rows, rewards)
    float(value)


def trl(c, turns: Turns) -> None:
  """`trl.GRPOTrainer` on a random Llama of `transformers`."""
  import numpy as np
  import tokenizers
  import torch
  import transformers
  from datasets import Dataset
  from trl import GRPOConfig, GRPOTrainer

  if c.clock == "cpu":
    torch.set_num_threads(1)
  torch.manual_seed(0)
  words = ["<pad>", "<eos>", *map(str, range(2, c.vocab_size))]
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, unk_token="<pad>"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="<pad>",
    eos_token="<eos>",
    padding_side="left",
  )
  shape = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.width,
    intermediate_size=c.ffn_width,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads,
    head_dim=c.head_width,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    eos_token_id=1,
    pad_token_id=0,
  )
  rng = np.random.default_rng(0)
  prompts = rng.integers(2, c.vocab_size, (NUM_PROMPTS, c.prompt)).tolist()

  def reward_fn(completions, completion_ids, **_):
    assert all(len(ids) == c.new for ids in completion_ids)
    turns.wait()
    return reward(completions)

  with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
      output_dir=folder,
      per_device_train_batch_size=c.prompts * c.group,
      num_generations=c.group,
      max_completion_length=c.new,
      max_steps=10**6,
      use_cpu=True,
      bf16=False,
      report_to=[],
      logging_steps=10**6,
      save_strategy="no",
      beta=0.0,
      temperature=1.0,
      top_k=0,
      learning_rate=1e-4,
      gradient_checkpointing=False,
      disable_tqdm=True,
      generation_kwargs={"min_new_tokens": c.new},
    )
    GRPOTrainer(
      model=transformers.LlamaForCausalLM(shape),
      reward_funcs=reward_fn,
      args=config,
      train_dataset=Dataset.from_dict(
        {"prompt": [" ".join(map(str, row)) for row in prompts]}
      ),
      processing_class=tokenizer,
    ).train()


class Numbers:
  """The tokenizer that tunix wants: a text is its tokens as numbers.

  The end mark is outside the vocabulary, so that no row ends early.
  """

  def __init__(self, vocab_size: int):
    self._end = vocab_size + 1

  def encode(self, text: str, **_) -> list[int]:
    return [int(number) for number in text.split()]

  def decode(self, ids, **_) -> str:
    return " ".join(str(int(i)) for i in ids)

  def bos_id(self) -> int:
    return 0

  def eos_id(self) -> int:
    return self._end

  def pad_id(self) -> int:
    return 0


def tunix_config(c):
  """Our shape as a Llama of tunix's."""
  from tunix.models.llama3 import model as llama

  return llama.ModelConfig(
    num_layers=c.num_layers,
    vocab_size=c.vocab_size,
    embed_dim=c.width,
    hidden_dim=c.ffn_width,
    num_heads=c.num_heads,
    head_dim=c.head_width,
    num_kv_heads=c.num_kv_heads,
    rope_theta=10000,
    norm_eps=1e-6,
  )


def tunix(c, turns: Turns) -> None:
  """`google-tunix` GRPOLearner with its own sampler and Llama, in float32."""
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.models.llama3 import model as llama
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
  role = rl_cluster.Role

  def reward_fn(prompts, completions, **_):
    assert all(len(text.split()) == c.new for text in completions)
    turns.wait()
    return reward(completions)

  def batches():
    rng = np.random.default_rng(0)
    while True:
      # It puts a token before the text by itself.
      rows = rng.integers(1, c.vocab_size, (c.prompts, c.prompt - 1)).tolist()
      texts = [" ".join(map(str, row)) for row in rows]
      yield {"prompts": np.array(texts)}

  with mesh:
    config = rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh
      ),
      rollout_engine="vanilla",
      offload_to_cpu=False,
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-4),
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=c.prompts,
        train_micro_batch_size=c.prompts,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=c.new,
        max_prompt_length=c.prompt,
        kv_cache_size=c.prompt + c.new,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
      ),
    )
    grpo_learner.GRPOLearner(
      rl_cluster=rl_cluster.RLCluster(
        actor=llama.Llama3(tunix_config(c), rngs=nnx.Rngs(0)),
        reference=None,
        tokenizer=Numbers(c.vocab_size),
        cluster_config=config,
      ),
      reward_fns=[reward_fn],
      algo_config=grpo_learner.GRPOConfig(
        num_generations=c.group, num_iterations=1, beta=0.0, epsilon=0.2
      ),
    ).train(batches())


PEERS = {  # name: (the peer, its package)
  "plain_jax": (plain_jax, "jax"),
  "trl": (trl, "trl"),
  "tunix": (tunix, "google-tunix"),
}

if __name__ == "__main__":
  peer, package = PEERS[sys.argv[1]]
  fields = json.loads(sys.argv[2])
  options = collections.namedtuple("Options", fields)(**fields)
  turns = Turns(options.clock, package)
  try:
    peer(options, turns)
  except ImportError as error:
    turns.answer(absent=str(error))
