# Every target calls the script a person would call by hand.
.PHONY: quick test check demo bench campaign

quick:  ## the tests that take seconds: under three minutes on two cores
	bash tests/run.sh -m "not slow"

test:  ## everything but the campaigns: under fifteen minutes on two cores
	bash tests/run.sh

check:  ## format, lint, types
	bash dev/check.sh

demo:  ## a small chat model on this machine's CPU
	bash speedrun.sh --preset cpu-demo

bench:  ## every benchmark; the figures go to benchmarks/record/
	bash dev/bench.sh

campaign:  ## the long fault campaigns
	bash tests/run.sh -m campaign
