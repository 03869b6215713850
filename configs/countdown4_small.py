"""Four-number Countdown from nothing, on two CPU cores.

As countdown.py with one number more: three steps, numbers 1 to 12.

  python -m o1jax.main --config=configs/countdown4_small.py --workdir=runs/c4

Machine: two cores of a server CPU, busy with other work at times: 17 minutes;
one core (`--config.mesh.num_cpu_devices=1`) took 28. Result (one seed, 512
held-out problems, standard error 2 points): greedy 31%; without the checker:

  tokens of     majority vote   best-of-N by value   MCTS by value
  8 solutions   30%             68%                  53% (255 of 264 tokens)
  32 solutions  40%             87%                  79% (1,011 of 1,056 tokens)

So here tree search by value is far above majority vote and not above best-of-N
by value. It answers with a right solution nearly whenever it has found one, but
it finds fewer: of 3,888 plays it reads 13 for 32 solutions' tokens, and
best-of-N 21 different ones. Other keys of the search gave 76% to 86% of 256
problems. Without widening (four candidates a node) MCTS was at 40% and 58%.

`:reflection` is a shorter run with fewer rows of play, and with rows in which
solutions are judged and revised: for strategies that revise, and for the
guidance self_evaluation. 21 minutes beside other work. Result (one seed, 512
held-out problems): greedy 20%, best-of-8 by value 43%, one of the 8 right 52%.
Its revisions, even those that the checker guides, are worth less than as many
tokens of new draws, and its judgements order solutions worse than its own
log-probs; docs/studies.md has the tables.

`:ppo` learns as above until greedy accuracy stops rising, then by PPO from 16
draws a problem. It has not been run to its end.

`:comparing` gives half of the rows of judging to pairs of solutions that say
the same or not, for semantic_entropy_by_policy in the study guidance. It has
not been run to its end.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
  """Returns the config; `arg` is None or one of those named above."""
  arguments = ("smoke", "reflection", "comparing", "ppo")
  if arg is not None and arg not in arguments:
    raise ValueError(f"unknown argument {arg!r}: {', '.join(arguments)}")
  config = ConfigDict()
  config.seed = 0  # everything random derives from it
  config.num_iterations = 28  # of search and learning

  config.task = ConfigDict()
  config.task.name = "countdown"  # countdown, game24 or arithmetic
  config.task.options = ConfigDict()
  config.task.options.num_numbers = 4  # numbers of a problem
  config.task.options.min_number = 1
  config.task.options.max_number = 12
  config.task.options.min_target = 10
  config.task.options.max_target = 99
  config.task.options.integers_only = True  # no fractions, nothing negative
  config.task.options.canonical_play = True  # larger operand first, in play
  config.task.options.balanced_hindsight = True  # each target once a play's set
  config.task.options.heldout = 0.06  # share of number multisets held out
  config.task.options.heldout_targets = 0.0  # share of targets held out
  config.task.options.heldout_seed = 0

  config.tokenizer = ConfigDict()
  config.tokenizer.vocab_size = 1400  # at most; 1,000 are numbers, 256 bytes
  config.tokenizer.max_number = 999  # that is one piece
  config.tokenizer.num_texts = 5000  # texts it is trained on

  config.lengths = ConfigDict()
  config.lengths.prompt_tokens = 10  # longest prompt
  config.lengths.step_tokens = 14  # longest step, its end included
  config.lengths.num_steps = 3  # steps of a solution
  config.lengths.row_tokens = 44  # longest row to learn from

  config.network = ConfigDict()
  config.network.num_layers = 3
  config.network.width = 96
  config.network.num_heads = 4
  config.network.num_kv_heads = 4
  config.network.head_width = 24
  config.network.ffn_width = 256
  config.network.value_hidden_width = 64  # hidden units of the value head
  config.network.value_bins = 0  # atoms of the value; 0: one logit
  config.network.rope_base = 100.0  # short rows: positions stay apart
  config.network.tied_embeddings = True  # the embedding is the policy head too
  config.network.embedding_scale = 10.0  # about the root of the width
  config.network.number_features = True  # embeddings start from number values
  config.network.lora_rank = 0  # of adapters of the layers; 0: none
  config.network.lora_alpha = 16.0  # what they add counts alpha / rank

  config.mesh = ConfigDict()
  config.mesh.num_cpu_devices = 2  # virtual devices, where there is no other
  config.mesh.data = -1  # problems and rows are shared out; -1: all devices
  config.mesh.fsdp = 1  # as data, and weights too
  config.mesh.tensor = 1  # weights

  config.initialize = ConfigDict()
  config.initialize.path = ""  # workdir or folder of a policy to begin with
  config.initialize.num_iterations = 2
  config.initialize.num_updates = 400  # in each
  config.initialize.rows = (
    ConfigDict()
  )  # of a batch, by kind; see o1jax/rows.py
  config.initialize.rows.random_play = 64

  config.search = ConfigDict()
  config.search.strategy = "mcts"  # see o1jax/search/strategies.py
  config.search.num_problems = 64  # new problems an iteration
  config.search.batch_size = 64  # searched at a time
  config.search.granularity = "step"  # step, segment or token
  config.search.num_revisions = 3  # of strategies that revise
  config.search.num_candidates = 8  # steps sampled at an expansion
  config.search.num_expansions = 16  # at most, a problem
  config.search.num_simulations = 512  # a problem
  config.search.num_parallel_leaves = 1  # expansions a tree and round
  config.search.virtual_loss = 1.0  # of a path that waits for its leaf
  config.search.discount = 1.0  # per step
  config.search.rule = "puct"  # puct, uct or gumbel
  config.search.rule_options = (
    ConfigDict()
  )  # its constants; see o1jax/search/selection.py
  config.search.select_by = "outcome"  # outcome or visits
  config.search.answer_by = "search"  # search, score, vote or weighted_vote
  config.search.fold = "last"  # of scores of steps: last, min, product, mean
  config.search.options = ConfigDict()  # more of the strategy
  config.search.reward = "checker"  # checker or value
  config.search.guidance = ConfigDict({"value": 1.0})  # weights by name
  config.search.num_workers = 0  # processes that check; 0: none of their own
  config.search.temperature = 1.0
  config.search.top_k = 0  # 0: off
  config.search.top_p = 1.0  # 1: off
  config.search.min_p = 0.0  # 0: off
  config.search.num_rollouts = 0  # continuations of every candidate
  config.search.rollout_weight = 0.0  # of these in its value
  config.search.memory = "tree"  # tree (shared keys and values) or tokens
  config.search.cache = ConfigDict()  # made smaller; see o1jax/node_store.py
  config.search.num_proposals = 0  # guessed for a call of the network; 0: none

  config.learn = ConfigDict()
  config.learn.num_updates = 200  # an iteration
  config.learn.updates_per_call = 20  # of the compiled program
  config.learn.num_microbatches = 1  # groups of rows, on each device
  config.learn.value_coefficient = 0.25  # of the value loss
  config.learn.play_outcomes = False  # teach the value at the end of play
  config.learn.average_decay = 0.995  # of the parameters that search
  config.learn.learning_rate_scale = 1.0  # of the schedule's rate
  config.learn.reference = "none"  # policy to stay near: none, start, iteration
  # Options of rows.policy_gradient, rows.best, rows.pairs and rows.process, see
  # o1jax/rollouts.py, o1jax/learning/objective.py and o1jax/process_rewards.py.
  config.learn.advantages = ConfigDict()
  config.learn.policy_gradient = ConfigDict()
  config.learn.preference = ConfigDict()
  config.learn.pairs = ConfigDict()
  config.learn.process = ConfigDict()
  config.learn.replay = (
    ConfigDict()
  )  # see o1jax/experience.py, Experience.sample
  config.learn.rows = ConfigDict()  # of a batch, by kind
  config.learn.rows.search = 3
  config.learn.rows.expert = 2
  config.learn.rows.hindsight = 3
  config.learn.rows.hindsight_play = 44
  config.learn.rows.consequences = 6
  config.learn.rows.value = 6
  config.learn.optimizer = ConfigDict()
  config.learn.optimizer.name = "muon"  # adamw, lion or muon
  config.learn.optimizer.learning_rate = 4e-3
  config.learn.optimizer.warmup_updates = 100
  config.learn.optimizer.schedule = "cosine"  # constant, linear or cosine
  config.learn.optimizer.end_fraction = 0.01  # last rate / highest rate
  config.learn.optimizer.weight_decay = 0.02
  config.learn.optimizer.clip_norm = 1.0
  config.learn.optimizer.b1 = 0.9
  config.learn.optimizer.b2 = 0.99
  config.learn.optimizer.trainable = "all"  # all, heads, trunk or adapters

  config.regimes = ConfigDict()  # ways to learn in turn; see o1jax/regimes.py
  config.regimes.names = ()  # in order; none: one, with the fields as they are
  config.regimes.changes = ConfigDict()  # name: fields that it changes

  config.texts = ConfigDict()  # of rows of such; see o1jax/corpora.py
  config.texts.documents = ""  # JSONL or plain text to pre-train on
  config.texts.instructions = ()  # JSONL of dialogs: "path=weight" each
  config.texts.diversity = 1.0  # share of distinct prompts kept
  config.texts.label_noise = 0.0  # share of responses under another prompt

  config.questions = ConfigDict()  # see o1jax/question_generator.py
  config.questions.source = "uniform"  # frontier or policy: who finds them

  config.experience = ConfigDict()
  config.experience.max_search = 20_000  # solutions kept
  config.experience.max_hindsight = 20_000  # relabelled solutions kept
  config.experience.max_demonstrations = 1_000  # kept, where read from a file
  config.experience.max_expert_per_problem = 4  # of D_expert
  config.experience.path = ""  # JSONL of solutions to begin with

  config.evaluation = ConfigDict()
  config.evaluation.num_problems = 512  # held out
  config.evaluation.batch_size = 512  # searched at a time
  config.evaluation.interval = 10  # iterations between; 0: end only
  config.evaluation.strategies = ("majority_vote", "best_of_n", "mcts")
  config.evaluation.efforts = (8, 32)  # budgets, in solutions' worth of tokens
  config.evaluation.num_candidates = 4  # of tree search
  config.evaluation.temperature = 1.0
  config.evaluation.rule = "puct"
  config.evaluation.rule_options = ConfigDict()
  config.evaluation.options = ConfigDict()  # more, by strategy
  config.evaluation.options.mcts = ConfigDict()
  config.evaluation.options.mcts.num_candidates = 1  # it widens instead
  config.evaluation.options.mcts.max_blocks = 32  # expansions of a node
  config.evaluation.options.mcts.widening_rate = 0.5  # see o1jax/search/mcts.py
  config.evaluation.reward = "value"  # the checker stays out of it
  config.evaluation.guidance = ConfigDict({"value": 1.0})  # weights by name

  config.metrics = ConfigDict()
  config.metrics.wandb_project = ""  # of Weights & Biases; none: not written to

  config.health = ConfigDict()  # what stops a run; see o1jax/health.py

  config.checkpoint = ConfigDict()
  config.checkpoint.interval = 1  # iterations
  config.checkpoint.keep_every = 10  # besides the last and the best
  config.checkpoint.num_samples = 50  # solutions written an iteration

  if arg in ("reflection", "comparing"):
    # Judgements, comparisons and revisions are three times as long as others.
    config.num_iterations = 16
    config.lengths.reflection_tokens = 132  # of such rows
    config.initialize.rows.random_play = 44
    config.initialize.rows.judging = 8
    config.initialize.rows.revising = 8
    config.learn.rows.hindsight_play = 30
    config.learn.rows.consequences = 4
    config.learn.rows.judging = 8
    config.learn.rows.revising = 8
    config.learn.rows.revised = 6
    config.evaluation.interval = 0
    config.evaluation.strategies = ("majority_vote", "best_of_n")
    config.evaluation.efforts = (8,)

  if arg == "comparing":
    for rows in (config.initialize.rows, config.learn.rows):
      rows.judging = 4
      rows.comparing = 4

  if arg == "ppo":
    config.num_iterations = 40
    config.learn.optimizer.schedule = "constant"
    config.regimes.names = ("cloning", "ppo")
    config.regimes.patience = 4
    config.regimes.changes.cloning = ()
    config.regimes.changes.ppo = (
      "search.strategy=best_of_n",
      "search.num_candidates=16",
      "search.num_expansions=1",
      "search.num_simulations=1",
      "learn.rows.search=0",
      "learn.rows.expert=0",
      "learn.rows.hindsight=0",
      "learn.rows.hindsight_play=0",
      "learn.rows.consequences=0",
      "learn.rows.value=0",
      "learn.rows.policy_gradient=64",
      "learn.reference=start",
      "learn.policy_gradient.kl_coefficient=0.02",
      "learn.learning_rate_scale=0.1",
    )

  if arg == "smoke":
    config.num_iterations = 3
    config.initialize.num_iterations = 2
    config.initialize.num_updates = 10
    config.learn.num_updates = 5
    config.learn.updates_per_call = 5
    config.learn.optimizer.warmup_updates = 5
    config.evaluation.num_problems = 32
    config.evaluation.batch_size = 32
    config.evaluation.interval = 5
    config.evaluation.strategies = ("best_of_n", "mcts")
    config.evaluation.efforts = (4,)
    config.checkpoint.keep_every = 2
    config.search.num_problems = 8
    config.search.batch_size = 8
    config.search.num_expansions = 4
    config.search.num_simulations = 16
  return config
