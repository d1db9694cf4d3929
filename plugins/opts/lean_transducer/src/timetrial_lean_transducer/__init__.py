"""timetrial opt `lean_transducer`: transducer loss without the (batch, time, label, vocabulary) tensor."""
