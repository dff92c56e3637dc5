"""What the sync scorer is given: a window of lip motion, and the sound around it."""

STEPS = 150  # of 20 ms: three seconds
REACH = 30  # steps to either side that are compared
ROWS = 2 * (STEPS + 2 * REACH)  # log-mel rows of 10 ms around a window
SOUND_RMS = 0.05  # all sound is brought to this level
