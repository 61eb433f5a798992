"""Strategies and codecs on slow links, beside plain DDP, torch's PowerSGD hook and torchft's DiLoCo.

    python -m bench.links                                     every cell on every link: most of a day
    python -m bench.links ddp diloco --links 20 --turns 1     the baseline and two cells, once, on one link
    python -m bench.links --steps 48 --turns 1                a fourth of the schedule: to see all of it work

It needs root. Hosts are network namespaces with one worker each, joined by a switch; a token bucket at both ends
of every cable limits what passes (`tc ... tbf`). There is no delay on the links: what many small messages cost on
long lines is not seen here. All hosts share the processors of this machine: with more hosts than cores a step takes
longer, and the link counts for less. Namespaces, queues and processes are removed at every ending; those of a run
that was killed (SIGKILL), at the next start.

What is measured. Every cell trains the main job's recipe (llama-tiny, the built-in corpus, prepared once) on the
same batches from the same weights; peers take shoal's model, loss and schedule, and differ in the exchange
alone. The time to a validation loss is the sum of the seconds of the steps until the line through the validations
crosses it; start and validation are left out. The loss is 2 % above the one with which DDP in float32 ends, unless
`--loss` names it. DDP in bf16 has the arithmetic of the recipe, as all other cells have whose name does not say
float32: of two ratios, the one against it tells what the exchange alone gains.

The limit beside each step: a step that sends B bytes over a link of R bit/s takes at least 8 B / R seconds. A
float32 all-reduce of 1,315,968 parameters between 2 hosts sends 2 (N-1)/N * 4 * 1,315,968 = 5.26 MB, so 2.1 s at
20 Mbit/s and 0.42 s at 100.

Compiling belongs to the first step of a compiled cell, and is found again in the next turns.

How long it takes. A run of 192 steps takes 192 times the step plus a minute to start and to validate: about 3
minutes on 2 cores where the link is no limit, 11 for a float32 all-reduce at 20 Mbit/s.
"""
