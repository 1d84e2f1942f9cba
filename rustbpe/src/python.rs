//! The border to Python, and nothing else: conversions, errors, the GIL and signals.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes};

use crate::bpe::check_vocab_size;
use crate::{available_threads, Bpe, Error, Id, Splitter, Trainer, Vocab, GPT4_PATTERN};

const BUFFER_BYTES: usize = 8 << 20; // counted in well under a second, so that Ctrl-C is heard in time
const SIGNAL_PERIOD: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Interrupted => PyKeyboardInterrupt::new_err("interrupted"),
            Error::TooLarge => PyRuntimeError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// A byte-level BPE tokenizer: train it, or build it from ranks, then encode and decode.
#[pyclass(name = "Tokenizer", module = "rustbpe", frozen)]
struct PyTokenizer {
    bpe: RwLock<Arc<Bpe>>,
}

impl PyTokenizer {
    fn wrap(bpe: Bpe) -> Self {
        PyTokenizer { bpe: RwLock::new(Arc::new(bpe)) }
    }

    fn bpe(&self) -> Arc<Bpe> {
        self.bpe.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl PyTokenizer {
    /// An untrained tokenizer: no pattern, and one token per byte.
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self::wrap(Bpe::new(Splitter::new("")?, Vocab::from_merges(&[])?)))
    }

    /// A tokenizer from (bytes, id) pairs, such as get_mergeable_ranks() returns, and a split pattern.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern))]
    fn from_ranks(py: Python<'_>, ranks: Vec<(Bound<'_, PyBytes>, Id)>, pattern: &str) -> PyResult<Self> {
        let ranks: Vec<_> = ranks.into_iter().map(|(token, id)| (token.as_bytes().to_vec(), id)).collect();
        let bpe = py.detach(|| Ok::<_, Error>(Bpe::new(Splitter::new(pattern)?, Vocab::from_ranks(ranks)?)));
        Ok(Self::wrap(bpe?))
    }

    /// Train on an iterator of str. Texts are taken `buffer_size` at a time (or 8 MiB, if that is less) and
    /// counted in parallel without the GIL. Without a pattern, GPT-4's is used. Deterministic: the highest
    /// count first, then the smaller pair of ids. Ctrl-C stops it and leaves the tokenizer as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size = 8192, pattern = None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        check_vocab_size(vocab_size)?;
        let mut trainer = Trainer::new(Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?, available_threads());
        let mut buffer: Vec<PyBackedStr> = Vec::new();
        let mut bytes = 0;
        for item in iterator.try_iter()? {
            let text: PyBackedStr = item?.extract()?;
            bytes += text.len();
            buffer.push(text);
            if buffer.len() >= buffer_size || bytes >= BUFFER_BYTES {
                py.detach(|| trainer.add(&buffer))?;
                buffer.clear();
                bytes = 0;
                py.check_signals()?;
            }
        }
        let (bpe, signal) = py.detach(|| {
            let mut signal = None;
            let mut heard = Instant::now();
            let bpe = trainer.add(&buffer).and_then(|()| {
                trainer.finish(vocab_size, &mut || {
                    if heard.elapsed() < SIGNAL_PERIOD {
                        return Ok(());
                    }
                    heard = Instant::now();
                    Python::attach(|py| py.check_signals()).map_err(|error| {
                        signal = Some(error);
                        Error::Interrupted
                    })
                })
            });
            (bpe, signal)
        });
        if let Some(error) = signal {
            return Err(error);
        }
        *self.bpe.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(bpe?);
        Ok(())
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        self.bpe().pattern().to_string()
    }

    /// The number of tokens: 256 bytes and one per merge.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.bpe().vocab().len()
    }

    /// The tokens as (bytes, id) pairs in the order of their ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, Id)> {
        self.bpe().vocab().tokens().map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<Vec<Id>> {
        let bpe = self.bpe();
        Ok(py.detach(|| bpe.encode(&text))?)
    }

    /// The ids of each text, in parallel; `num_threads` defaults to all.
    #[pyo3(signature = (texts, num_threads = None))]
    fn batch_encode(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Vec<Id>>> {
        let bpe = self.bpe();
        Ok(py.detach(|| bpe.encode_batch(&texts, num_threads.unwrap_or_else(available_threads)))?)
    }

    /// The ids of all texts one after another as native int32, and how many belong to each text.
    #[pyo3(signature = (texts, num_threads = None))]
    fn batch_encode_buffer<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Vec<usize>)> {
        let bpe = self.bpe();
        let batch = py.detach(|| bpe.encode_batch(&texts, num_threads.unwrap_or_else(available_threads)))?;
        let lengths: Vec<usize> = batch.iter().map(Vec::len).collect();
        let buffer = PyByteArray::new_with(py, lengths.iter().sum::<usize>() * 4, |bytes| {
            for (slot, id) in bytes.chunks_exact_mut(4).zip(batch.iter().flatten()) {
                slot.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((buffer, lengths))
    }

    /// The text of ids; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, py: Python<'_>, ids: Vec<Id>) -> PyResult<String> {
        let bpe = self.bpe();
        let bytes = py.detach(|| bpe.decode(&ids))?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// The bytes of ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<Id>) -> PyResult<Bound<'py, PyBytes>> {
        let bpe = self.bpe();
        Ok(PyBytes::new(py, &py.detach(|| bpe.decode(&ids))?))
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.vocab_size())
    }
}

/// Byte-pair encoding in Rust.
#[pymodule(gil_used = false)]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<PyTokenizer>()
}
