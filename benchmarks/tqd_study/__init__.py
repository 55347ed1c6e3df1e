"""Does placing imperfect clips at the right noise level pay? A study on moving sprites; see README.md."""
