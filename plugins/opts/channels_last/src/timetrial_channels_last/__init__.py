"""timetrial opt `channels_last`: images and convolution weights with the channels innermost in memory."""
