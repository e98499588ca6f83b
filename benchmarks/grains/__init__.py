"""The laboratory of grain blindness: arms of stage 3 from common starts, paired, with intervals."""
