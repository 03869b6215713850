"""Three-number Countdown from nothing, on two CPU cores.

The policy learns the form of the task from random legal play whose target has
nothing to do with the play. Then, in every iteration, tree search looks for
solutions of 64 new problems, and the policy learns from what it found, from
failures relabelled with the target they reach, and from fresh play relabelled
the same way (hindsight), much of it cut off where the first step has chosen
(openings). No solver is asked.

  python -m o1jax.main --config=configs/countdown.py --workdir=runs/countdown
  python -m o1jax.main --config=configs/countdown.py:smoke --workdir=/tmp/smoke

Machine: two cores of a server CPU. Minutes: 14, compilation and evaluations
included. Result (one seed, 512 held-out problems, standard error 2 points):
greedy 84%, and without the checker at the tokens of 8 solutions: majority vote
84%, best-of-8 by value 89%, MCTS by value 90%.

`:short` has 20 iterations and more openings, for one or two devices. 7 minutes:
greedy 80%, best-of-8 by value 88%, MCTS by value 89%.

`:no_hindsight` is the run without relabelled play and failures: it learns from
what its own search finds, of sixteen times as many problems an iteration. 25
minutes on one core (`--config.mesh.num_cpu_devices=1`) of a machine a third
faster, greedy 63%.

`:thinking` has whole rows instead of openings, and from iteration 12 on also
chains of thought: wrong attempts, what is wrong with them, and a right one. 5
minutes on that machine (one seed, 512 held-out problems): greedy 70%, a chain
decoded greedily 76% with 41 tokens where one solution has 20.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
  """Returns the config; `arg` is None or one of those named above."""
  arguments = ("smoke", "no_hindsight", "short", "thinking")
  if arg is not None and arg not in arguments:
    raise ValueError(f"unknown argument {arg!r}: {', '.join(arguments)}")
  config = ConfigDict()
  config.seed = 0  # everything random derives from it
  config.num_iterations = 44  # of search and learning

  config.task = ConfigDict()
  config.task.name = "countdown"  # countdown, game24 or arithmetic
  config.task.options = ConfigDict()
  config.task.options.num_numbers = 3  # numbers of a problem
  config.task.options.min_number = 1
  config.task.options.max_number = 20
  config.task.options.min_target = 10
  config.task.options.max_target = 99
  config.task.options.integers_only = True  # no fractions, nothing negative
  config.task.options.sorted_numbers = True  # in prompts
  config.task.options.canonical_play = True  # larger operand first, in play
  config.task.options.balanced_hindsight = True  # each target once a play's set
  config.task.options.heldout = 0.06  # share of number multisets held out
  config.task.options.heldout_targets = 0.0  # share of targets held out
  config.task.options.heldout_seed = 0

  config.tokenizer = ConfigDict()
  config.tokenizer.vocab_size = 800  # at most; 401 are numbers, 256 bytes
  # One piece each up to this, which no first result exceeds. A last one above
  # it is wrong and makes a row too long, which is left out: 9% of random play.
  config.tokenizer.max_number = 400
  config.tokenizer.num_texts = 5000  # texts it is trained on

  config.lengths = ConfigDict()
  config.lengths.prompt_tokens = 8  # longest prompt
  config.lengths.step_tokens = 12  # longest step, its end included
  config.lengths.num_steps = 2  # steps of a solution
  config.lengths.row_tokens = 28  # longest row to learn from
  config.lengths.opening_tokens = 11  # of a row cut off after the first choice

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
  config.initialize.num_iterations = 1
  config.initialize.num_updates = 200  # in each
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
  config.search.num_expansions = 9  # at most, a problem
  config.search.num_simulations = 288  # a problem
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
  config.learn.play_outcomes = True  # teach the value at the end of play
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
  config.learn.rows.search = 2
  config.learn.rows.expert = 1
  config.learn.rows.hindsight = 2
  config.learn.rows.hindsight_play = 24
  config.learn.rows.openings = 56
  config.learn.rows.consequences = 4
  config.learn.rows.value = 7
  config.learn.optimizer = ConfigDict()
  config.learn.optimizer.name = "muon"  # adamw, lion or muon
  config.learn.optimizer.learning_rate = 6e-3
  config.learn.optimizer.warmup_updates = 100
  config.learn.optimizer.schedule = "cosine"  # constant, linear or cosine
  config.learn.optimizer.end_fraction = 0.01  # last rate / highest rate
  # With less, the last iterations learn the training problems by heart.
  config.learn.optimizer.weight_decay = 0.4
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
  config.evaluation.interval = 15  # iterations between; 0: end only
  config.evaluation.strategies = ("majority_vote", "best_of_n", "mcts")
  config.evaluation.efforts = (8,)  # budgets, in solutions' worth of tokens
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
  config.checkpoint.keep_every = 15  # besides the last and the best
  config.checkpoint.num_samples = 50  # solutions written an iteration

  if arg == "no_hindsight":
    # What is left to learn from are the solutions that search finds itself, so
    # more problems are searched and all that was found is kept.
    config.num_iterations = 50
    config.tokenizer.vocab_size = 1400
    config.tokenizer.max_number = 999
    config.lengths.row_tokens = 30
    config.initialize.num_iterations = 2
    config.initialize.num_updates = 400
    config.evaluation.interval = 13
    config.checkpoint.keep_every = 13
    config.learn.optimizer.learning_rate = 4e-3
    config.learn.optimizer.weight_decay = 0.02
    config.search.num_problems = 1024
    config.search.batch_size = 256
    config.learn.num_updates = 100
    config.experience.max_search = 150_000
    config.learn.play_outcomes = False
    config.learn.rows.hindsight = 0
    config.learn.rows.hindsight_play = 0
    config.learn.rows.openings = 0
    config.learn.rows.search = 8
    config.learn.rows.expert = 36
    config.learn.rows.consequences = 12
    config.learn.rows.value = 8

  if arg == "short":
    config.num_iterations = 20
    config.evaluation.interval = 0
    config.learn.rows.hindsight_play = 20
    config.learn.rows.openings = 64
    config.learn.rows.value = 5

  if arg == "thinking":
    config.num_iterations = 20
    config.evaluation.interval = 0
    config.evaluation.strategies = ("best_of_n",)
    # Room for three wrong attempts and a right one, or for two short chains.
    config.lengths.reflection_tokens = 128
    config.lengths.thinking_tokens = 180
    config.learn.play_outcomes = False
    config.learn.rows.hindsight_play = 51
    config.learn.rows.openings = 0
    config.learn.rows.value = 4
    config.regimes.names = ("solutions", "chains")
    config.regimes.max_iterations = 11  # of solutions; chains are last
    config.regimes.patience = 11
    config.regimes.changes.solutions = ()
    config.regimes.changes.chains = (
      "learn.rows.hindsight_play=27",
      "learn.rows.retrying=7",
      "learn.rows.retried=3",
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
