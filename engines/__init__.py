"""Engine stage: build, run, bench and compare on each runtime. Stage package, not API."""
