//! Bytes to text while they arrive: a character is held back until it is whole.

/// Turns chunks of bytes into text. All that it returns, one after another, is what decoding all bytes at once
/// gives, with U+FFFD for what is not UTF-8.
///
/// ```
/// let mut decoder = rustbpe::Decoder::default();
/// assert_eq!(decoder.push(b"caf\xc3"), "caf");
/// assert_eq!(decoder.push(b"\xa9 \xe2\x82"), "é ");
/// assert_eq!(decoder.finish(), "\u{fffd}");
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    held: Vec<u8>, // at most three bytes, which may become a character
}

impl Decoder {
    /// The text that is certain after these bytes.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        loop {
            let (valid, bad) = match std::str::from_utf8(rest) {
                Ok(valid) => (valid, Some(0)),
                Err(error) => {
                    let valid = std::str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or_default();
                    (valid, error.error_len())
                }
            };
            text.push_str(valid);
            rest = &rest[valid.len()..];
            match bad {
                Some(0) | None => break, // all is text, or the end is the beginning of a character
                Some(size) => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[size..];
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// The end of the text: U+FFFD if a character was left unfinished. The decoder can then start anew.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&held).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn chunks_give_the_text_of_the_whole(
            chunks in prop::collection::vec(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..4),
                prop::collection::vec(prop::sample::select(b"a\x80\xbf\xc3\xe2\x82\xac\xed\xa0\xf0\x9f\x98\xf4".to_vec()), 0..3),
                ".{0,3}".prop_map(String::into_bytes),
            ], 0..12),
        ) {
            let mut decoder = Decoder::default();
            let mut text: String = chunks.iter().map(|chunk| decoder.push(chunk)).collect();
            prop_assert!(decoder.held.len() <= 3);
            text += &decoder.finish();
            let whole = chunks.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
            prop_assert_eq!(decoder.finish(), "");
        }

        #[test]
        fn whole_characters_are_never_held_back(text in ".{0,20}") {
            prop_assert_eq!(Decoder::default().push(text.as_bytes()), text);
        }
    }
}
