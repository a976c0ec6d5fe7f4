"""Every key, its default, its unit and its choices. Experiments copy this and change what they need."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default configuration: SPEC-sized MMEI on feature shards."""
    config = ml_collections.ConfigDict()

    # Seed of parameters, record order and dropout (integer in [0, 2**32)). Same seed, same run.
    config.seed = 0

    config.data = data = ml_collections.ConfigDict()
    # Folder with manifest.json and its shards (path).
    data.path = "runs/data/aigc_int"
    # Names of manifest splits, joined (tuples of names). A split may appear in one of the three only, and
    # one named "test" neither in the first nor in the second.
    data.train_splits = ("train",)
    data.validation_splits = ("validation",)
    data.test_splits = ("test",)
    # Parquet file of affect profiles (python -m mmei_jax.affect_profiles): what another run read in each user's earlier
    # records, for the user side of Eq. 7; "" reads none.
    data.affect_profiles = ""
    # Modalities that the model reads: some of "vision", "audio", "text".
    data.modalities = ("vision", "audio", "text")
    # Tokens per record: length buckets, smallest first; a batch is padded to the first set of buckets into which all
    # its records fit. The last is the maximum: longer records are cut, and counted. As many buckets for each modality.
    data.max_tokens = ml_collections.ConfigDict(dict(vision=(16,), audio=(50,), text=(32,)))
    # Packing: several records share a row of tokens, so that less of a batch is padding. The records of an update and
    # their losses stay the same. The first lines of a run say what share of the token places is used.
    data.packing = packing = ml_collections.ConfigDict()
    # Most records in one row; 1 gives each record a row of its own (no packing).
    packing.records_per_row = 1
    # Rows of a training batch, over all devices, fewest first; () without packing. A batch takes the first number into
    # which it fits, and is padded to max_tokens where it fits in none. Each number is one more shape to compile, and a
    # multiple of the devices. Evaluation batches have rows in proportion to evaluation_batch_size.
    packing.num_rows = ()
    # Token places of one row; at least the maximum of max_tokens. Long rows are filled better, but cost more attention.
    # Not read without packing.
    packing.tokens_per_row = ml_collections.ConfigDict(dict(vision=28, audio=66, text=60))
    # Whether features are centred and scaled by the mean and deviation of the training splits, per feature (bool).
    data.standardize = False
    # Records per update, over all devices.
    data.batch_size = 32
    # Records per evaluation batch, over all devices.
    data.evaluation_batch_size = 128
    # Threads that read and pad batches.
    data.num_reader_threads = 1
    # Batches kept ready on the devices, ahead of the step.
    data.num_prefetch_batches = 2

    config.model = model = ml_collections.ConfigDict()
    # What fuses the modalities: "mmei" (Eq. 1-3), or a baseline of Table 1 with the same inputs, heads and losses:
    # "multimodal_transformer" (one Transformer over all tokens, no Eq. 3), "late_fusion" (one model per modality, their
    # probabilities averaged), "pooled_logistic" (linear layers on the tokens' means). With one modality, "mmei" is the
    # unimodal row.
    model.architecture = "mmei"
    # Encoders inside the model, for training end to end on raw media (extraction with --depth=raw): folders made by
    # python -m mmei_jax.encoders.pretrained or random_weights, with whose weights training begins. "": the data set
    # holds features. optimizer.rate_multipliers give encoder_vision/, encoder_audio/ and encoder_text/ a rate of their
    # own, or freeze them or a part of them; data.max_tokens counts frames, samples and token ids.
    model.encoders = encoders = ml_collections.ConfigDict()
    # A ViT, a Wav2Vec2, a BERT.
    encoders.vision = ""
    encoders.audio = ""
    encoders.text = ""
    # The ViT's state that stands for a frame: "first" or "mean_of_patches".
    encoders.vision_token = "first"
    # The Wav2Vec2's states: those after the "last" layer, or the "sum_of_last_four".
    encoders.audio_layers = "last"
    # Frames of sound (50 a second) whose mean is one token.
    encoders.audio_frames_per_token = 1
    # What the backward pass through the encoders computes again instead of keeping: "none", "layer" (everything inside
    # a layer: least memory) or "products" (all but the results of products with parameters).
    encoders.remat = "none"
    # Model dimension d (features).
    model.dim = 256
    # Attention heads; divides dim.
    model.num_heads = 8
    # Cross-modal layers.
    model.num_layers = 4
    # Hidden features of each feed-forward block.
    model.feedforward_dim = 1024
    # Dropout on embeddings and residual branches (rate).
    model.dropout_rate = 0.2
    # Chance that a present modality is hidden from a training record; at least one is always kept (rate).
    model.modality_dropout_rate = 0.1
    # Eq. 1: bias of the projections, learned modality-type and position embeddings (bool).
    model.projection_bias = True
    model.modality_embedding = True
    model.position_embedding = True
    # Eq. 3, from sequence to vector: "mean" over valid tokens, "attention" pooling, "first" valid token.
    model.pooling = "mean"
    # Eq. 3, scores behind alpha: "additive" per modality, a scorer on the "concatenation", three "scalars", or
    # "uniform" (the same weight for all present modalities, nothing learned). Read by "mmei" alone.
    model.modality_weighting = "additive"
    # Whether modalities read one another (Eq. 2's cross-attention; bool). Read by "mmei" alone.
    model.cross_attention = True
    # Transformer layers of each head; 0 is Eq. 4-5 to the letter: a linear layer on F.
    model.head_num_layers = 1
    # Features of user and item embeddings (Eq. 7).
    model.embedding_dim = 128
    # Whether user and item embeddings have unit length, so that Eq. 7 is a cosine (bool).
    model.normalize_embeddings = True
    # Whether the content tower reads the items' features (bool).
    model.content_features = True
    # Folder of a converted BERT (python -m mmei_jax.encoders.pretrained) with which the content tower reads the items'
    # title, description, tags, creator and kind; "" reads no words.
    model.content_encoder = ""
    # "frozen": the BERT encodes every item once, before the start. "trained": it is part of the model, whose parameters
    # content_tower/encoder/... learn; optimizer.rate_multipliers give them a rate of their own, or freeze some of them.
    model.content_encoder_training = "frozen"
    # Tokens of an item's words that are read, at least 3; what is beyond is cut off.
    model.content_max_tokens = 32
    # Whether every user of the training splits has a learned embedding, added to that of their affect (bool); other
    # users are ranked for by affect alone.
    model.user_embedding = False
    # How often the user is unknown in training, in [0, 1): embedding and profile are then left out.
    model.user_dropout_rate = 0.0
    # Matrix multiplications: "float32" or "bfloat16". Parameters, norms, softmax and losses stay float32.
    model.compute_dtype = "float32"

    config.loss = loss = ml_collections.ConfigDict()
    # Emotion task: "softmax" (one class), "sigmoid" (several), "regression" (a number), or "none": no task at all (the
    # other two are "none" then as well), but pretraining.
    loss.emotion = "softmax"
    # The manifest's label that the emotion head learns.
    loss.emotion_label = "emotion"
    # Pairs (class name, weight), by name, for the softmax emotion loss; () weighs all classes 1.
    loss.emotion_class_weights = ()
    # Gamma of the focal loss (Lin et al., 2017), in the softmax and sigmoid losses of emotion and intent (at least 0):
    # the larger, the less do records count that are told well already. 0 is cross-entropy; the authors take 2.
    loss.focal_gamma = 0.0
    # Tau of the logit adjustment (Menon et al., 2021), in the softmax losses of emotion and intent (at least 0):
    # training adds tau times the log share of each class among the training records to the logits. Evaluation and
    # prediction do not, and so choose rare classes more often. 0 adjusts nothing, 1 aims at the classes' mean recall.
    loss.logit_adjustment = 0.0
    # Intent task: "softmax" or "none".
    loss.intent = "softmax"
    # Ranking loss: "in_batch_softmax", "bpr", "listnet" or "none".
    loss.ranking = "in_batch_softmax"
    # lambda_1 and lambda_2 of Eq. 6 (weights).
    loss.recognition_weight = 1.0
    loss.ranking_weight = 0.5
    # "fixed" uses the two weights alone; "uncertainty" also learns one variance per task.
    loss.task_weighting = "fixed"
    # Divides the scores of the ranking losses (positive number).
    loss.temperature = 0.1
    # Whether in-batch scores are corrected for how often an item is sampled (bool).
    loss.logq_correction = True
    # Whether other records' positives that are this record's own positive are left out as negatives (bool).
    loss.remove_accidental_hits = True

    # Objectives that need no label, beside the tasks or, with loss.emotion = "none", alone (configs/pretrain.py).
    # docs/pretraining.md tells what they compute. For the architecture "mmei" with two modalities or three.
    config.pretraining = pretraining = ml_collections.ConfigDict()
    # Weight of the contrastive alignment of every two modalities (InfoNCE both ways); 0 is off. Negatives are the other
    # records of the batch, over all devices; with train.gradient_accumulation_steps those of the micro-batch alone.
    pretraining.contrastive_weight = 0.0
    # Records whose scores with all others are in memory at once; the loss does not depend on it.
    pretraining.contrastive_chunk_size = 1024
    # Features of the projections that are compared.
    pretraining.projection_dim = 128
    # Divides the compared scores at the start, between 0.01 and 1; learned from there, within these bounds.
    pretraining.initial_temperature = 0.07
    # Weight of masked prediction: of every record one modality is masked, whose features are predicted from the states
    # after fusion (mean squared error of standardised features); 0 is off. Needs data.standardize for features.
    pretraining.masked_weight = 0.0
    # Share of that modality's tokens that are masked. 1: all, so that the prediction reads the other modalities alone.
    # Below 1 its own other tokens are read too.
    pretraining.mask_rate = 1.0
    # Tokens that are masked together (1: each by itself); for a mask_rate below 1.
    pretraining.mask_span = 1

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # Peak rate of AdamW.
    optimizer.learning_rate = 1e-4
    # "constant", "step" (multiplied by step_factor at each of step_epochs) or "warmup_cosine".
    optimizer.schedule = "warmup_cosine"
    # Share of all updates spent warming up ("warmup_cosine"), in [0, 1).
    optimizer.warmup_fraction = 0.05
    # Epochs after which "step" multiplies the rate, and the factor.
    optimizer.step_epochs = ()
    optimizer.step_factor = 0.1
    # Decoupled weight decay; not on biases, norms and embeddings of types and positions.
    optimizer.weight_decay = 0.01
    # Decay of AdamW's running means of the gradient and of its square, in [0, 1).
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.999
    # Largest global norm of the gradients.
    optimizer.clip_norm = 1.0
    # Ordered pairs (regular expression on "a/b/c" parameter names, factor on the rate); first match counts, 0 freezes.
    optimizer.rate_multipliers = ()

    config.train = train = ml_collections.ConfigDict()
    # Passes over the training splits.
    train.num_epochs = 100
    # Micro-batches per update; divides data.batch_size.
    train.gradient_accumulation_steps = 1
    # Updates between log lines.
    train.log_every_steps = 50
    # Updates between checkpoints.
    train.save_every_steps = 1000
    # Epochs between evaluations on the validation splits.
    train.evaluate_every_epochs = 1
    # The "validation/..." metric that picks the best checkpoint: the smallest for losses and errors, else the largest.
    train.best_metric = "validation/mean_accuracy"
    # Evaluations without a new best after which training stops; 0 never stops early.
    train.patience_evaluations = 0
    # Whether the ids of every update's records are written to record_ids.jsonl (bool).
    train.write_record_ids = False
    # Folder of a run whose best parameters training begins with; "" begins with random ones. Of a run of pretraining
    # alone everything is taken but heads, user side, content tower and the weights of Eq. 3, which it did not train.
    train.initial_workdir = ""
    # Regular expression: parameters whose "a/b/c" names it finds are taken from there, the others are random. The user
    # side alone: "^(?!content_tower/)". With optimizer.rate_multipliers = (("^(?!content_tower/)", 0.0),) the content
    # tower is then trained alone.
    train.initial_parameters = ""

    config.mesh = mesh = ml_collections.ConfigDict()
    # Devices over which the batch is split, each with a copy of what the other two axes split; -1 takes all that are
    # left.
    mesh.data = -1
    # Devices over which the batch is split, and with it every parameter that has the model dimension.
    mesh.fsdp = 1
    # Devices over which attention heads and feed-forward features are split.
    mesh.tensor = 1
    # Regular expressions on "a/b/c" parameter names: what they find may lie whole on every device although fsdp or
    # tensor is above 1. Any other parameter of 65,536 numbers or more that neither splits is refused.
    mesh.replicated = ()
    return config
